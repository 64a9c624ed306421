"""Tokens for comparing texts in any script.

Where a script writes spaces, a token is a word. Where it does not (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan),
tokens are overlapping pairs of characters: single ones match by chance too often (の, は), whole runs never.
"""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = (
    "\u3005-\u3007\u3031-\u3035\u303b\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd\uff66-\uff9f"  # Han, half-width kana
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_RUN = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}]+")


def has_unspaced(text: str) -> bool:
    """Whether any character belongs to a script written without spaces."""
    return _UNSPACED_CHARACTER.search(text) is not None


def spaced_out(text: str) -> str:
    """The text with every character of an unspaced script set apart, as BLEU's character tokenisation wants it."""
    return _UNSPACED_CHARACTER.sub(lambda m: f" {m.group()} ", text)


def words(text: str) -> list[str]:
    """Tokens without punctuation, case and width; the bare characters where nothing else is left ('?', an emoji)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Marks belong to words: Python's \w does not hold the vowel signs of Devanagari.
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded)
    tokens: list[str] = []
    for chunk in kept.split():
        for run in _RUN.findall(chunk):
            if not _UNSPACED_CHARACTER.match(run) or len(run) == 1:
                tokens.append(run)
            else:
                tokens.extend(run[at : at + 2] for at in range(len(run) - 1))
    return tokens or [c for c in folded if not c.isspace()]


class ScriptAware:
    """`words` in the shape that rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens of one text."""
        return words(text)
