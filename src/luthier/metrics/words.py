"""Tokens for comparing texts in any script.

Where a script writes spaces, a token is a word. Where it does not (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan),
tokens are overlapping pairs of signs: single ones match by chance too often (の, は), whole runs never. A sign is a
character or a form of politeness (ました, 请问, ครับ), which a morphological tokeniser keeps whole as well: as
characters, sentences that have nothing else in common would share half of what they are made of.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

_UNSPACED = (
    "\u3005-\u3007\u3031-\u3035\u303b\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd\uff66-\uff9f"  # Han, half-width kana
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
)
_FORMS = 0xF0000, 65521  # private characters that stand for forms: the first, and how many
_SIGNS = f"{_UNSPACED}\U000f0000-\U000ffff0"
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_SIGN = re.compile(f"[{_SIGNS}]")
_RUN = re.compile(f"[{_SIGNS}]+|[^{_SIGNS}]+")

# How Japanese endings are built: what they hang on, verbs and nouns that help, the polite form, particles.
_HANGING = "(?:っ?ても?|でも?|う|こと[がは]|かも|なければ|なくては|ように|お願い|申し訳)"
_HELPING = "(?:し|い|くれ|もらえ|おり|あり|なり|でき|しれ|いたし|ござい|いただき|いただけ|しまい|まいり|申し上げ)"
_MEANT = "(?:かった|たい|ない|(?:っ?ても|でも)?いい|い|の|ん|そう|よう|はず|つもり)"
_POLITE = re.compile(
    f"(?:(?:{_HANGING}?{_HELPING}){{0,4}}(?:ます|ました|ません(?:でした)?|ましょう)"
    f"|(?:[しっ]?て|で)?ください(?:ませ)?|{_MEANT}?(?:です|でした|でしょう))"
    "(?:か|ね|よ|が|から|ので|けど){0,2}(?![\u3041-\u3096])"  # where hiragana ends, as a clause does
    "|请问|請問|您好|谢谢|謝謝"
    "|(?:ด้วย|หน่อย|แล้ว|(?:ได้)?ไหม)?(?:นะ)?(?:ครับ|คับ|ค่ะ|คะ|จ้ะ)(?![\u0e00-\u0e7f])"
)


def signs(text: str) -> str:
    """The text with each form of politeness as one character, the same one for the same form."""
    return _POLITE.sub(lambda form: chr(_FORMS[0] + zlib.crc32(form.group().encode()) % _FORMS[1]), text)


def spaced_out(text: str) -> str:
    """The text with every sign of an unspaced script set apart, as BLEU's character tokenisation wants it."""
    if not _UNSPACED_CHARACTER.search(text):
        return text
    return _SIGN.sub(lambda m: f" {m.group()} ", signs(text))


def words(text: str) -> list[str]:
    """Tokens without punctuation, case and width; the bare characters where nothing else is left ('?', an emoji)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Marks belong to words: Python's \w does not hold the vowel signs of Devanagari.
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded)
    tokens: list[str] = []
    for chunk in signs(kept).split():
        for run in _RUN.findall(chunk):
            if not _SIGN.match(run) or len(run) == 1:
                tokens.append(run)
            else:
                tokens.extend(run[at : at + 2] for at in range(len(run) - 1))
    return tokens or [c for c in folded if not c.isspace()]


class ScriptAware:
    """`words` in the shape that rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens of one text."""
        return words(text)
