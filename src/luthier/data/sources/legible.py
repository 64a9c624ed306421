"""Whether a text reads as language: words of letters that one language has, characters that its standard calls common.

The wrong reading of bytes is made of letters too, but its words hold signs (³ódka for łódka), capitals in the middle,
or letters that no language has together (trčs ętre for très être). What is counted is how many languages it takes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import pairwise

# The letters beyond a to z of a language, and the signs that belong to its words.
ALPHABETS: dict[str, frozenset[str]] = {
    name: frozenset(letters)
    for name, letters in {
        "Albanian": "çë",
        "Catalan": "àçèéíïòóúü",
        "Croatian": "čćđšž",
        "Czech": "áčďéěíňóřšťúůýž",
        "Danish": "æøåé",
        "Dutch": "áèéëíïóöü",
        "Estonian": "äõöüšž",
        "French": "àâæçèéêëîïôœùûüÿ",
        "German": "äöüß",
        "Greek": "αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώϊϋΐΰ",
        "Hungarian": "áéíóöőúüű",
        "Icelandic": "áæéíðóöúýþ",
        "Italian": "àèéìîòóùªº",
        "Polish": "ąćęłńóśźż",
        "Portuguese": "áàâãçéêíóôõúªº",
        "Romanian": "ăâîşţșț",
        "Russian": "абвгдежзийклмнопрстуфхцчшщъыьэюяё",
        "Serbian": "абвгдежзијклмнопрстуфхцчшљњђћџ",
        "Slovak": "áäčďéíĺľňóôŕšťúýž",
        "Spanish": "áéíñóúü¿¡ªº",
        "Swedish": "åäöé",
        "Turkish": "âçğıîöşüû",
        "Ukrainian": "абвгдежзийклмнопрстуфхцчшщьюяєіїґў",
    }.items()
}
# Lead bytes, in the standard named, of the characters that are common in the language of an encoding.
COMMON: dict[str, tuple[str, range]] = {
    "cp932": ("euc_jp", range(0xB0, 0xD0)),
    "euc_jp": ("euc_jp", range(0xB0, 0xD0)),
    "gb18030": ("gb2312", range(0xB0, 0xD8)),
    "big5": ("big5", range(0xA4, 0xC7)),
    "cp949": ("euc_kr", range(0xB0, 0xC9)),
}
OTHERS = frozenset(("cp1251", "koi8_r", "cp1253"))  # encodings of other letters than Latin ones
ENOUGH = 0.98  # share of the words that have to be of the languages: a foreign name may stand among them
MOST_COMMON = 0.8  # share of common characters; the others are those of names
MOST = 2  # languages of one file; wrong readings take more
UNITS = frozenset(("m", "mm", "cm", "dm", "km", "ft", "in", "yd"))  # before ² and ³

_WORD = re.compile(r"(?:[A-Za-z0-9]|(?!\s)[^\x00-\x7f])+")
_SPLIT = re.compile("[–—…’‘·‑\xad]+")  # also between the letters of a word
_EDGES = "“”„‚‘’«»‹›•"
_MEASURE = re.compile("[0-9]*[°µ][A-Za-z]{0,2}")  # 20°C, 5µm
_AFTER = "®©™°²³¹"  # signs that may follow a word


def languages(text: str, codec: str) -> int | None:
    """How many languages it takes to write the words of ``text`` that are not ASCII; None where they are no words."""
    if codec in COMMON:
        return _wide(text, codec)
    words: Counter[frozenset[str]] = Counter()
    strays = other = 0
    for whole in _WORD.findall(text):
        if whole.isascii():
            continue
        for part in _SPLIT.split(whole.strip(_EDGES)):
            letters = _letters(part.strip(_EDGES))
            if letters is None:
                strays += 1
            elif letters:
                words[letters] += 1
                other += len(part) > 1 and not letters & _LATIN
    if strays > (1 - ENOUGH) * (strays + words.total()):
        return None
    if not other and (codec in OTHERS or any(not letters & _LATIN for letters in words)):  # à alone is no Russian а
        return None
    return _fewest(words)


_LATIN = frozenset(c for letters in ALPHABETS.values() for c in letters if ord(c) < 0x370)


_SYLLABIC = re.compile("(^|[aeiouyáéíóôúýä])[ŕĺ]|[ŕĺ]([aeiouyáéíóôúýä]|$)")  # they stand between consonants: vŕba
_ACCENTED = frozenset("άέήίόύώΐΰ")  # a Greek word of some length has one of them


@lru_cache(1 << 16)
def _letters(word: str) -> frozenset[str] | None:
    """The letters beyond ASCII of a word; None where it is no word."""
    if word.isascii() or _MEASURE.fullmatch(word):
        return frozenset()
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co") or "\u2500" <= c <= "\u259f" or c == "¤" for c in word):
        return None
    body = word.rstrip(_AFTER)
    if set(word[len(body) :]) & set("²³¹") and body.isalpha() and body.lower() not in UNITS:
        return None
    if not any(c.isalpha() and c not in "ªº" for c in body):
        return frozenset()  # numbers and signs
    far = [c for c in body if not c.isascii()]
    if not all(c.isalpha() or unicodedata.category(c).startswith("M") for c in far if c not in "¿¡"):
        return None
    if set(body[1:]) & set("¿¡") or any(c.isdigit() for c in body):
        return None if far else frozenset()
    if any(a.islower() and b.isupper() and not (a + b).isascii() for a, b in pairwise(body)):
        return None
    if _SYLLABIC.search(body.lower()):
        return None
    scripts = {_script(c) for c in body if c not in "¿¡"}
    if scripts == {"GREEK"} and (
        "ς" in body[:-1] or (len(body) > 4 and not body.isupper() and not set(body) & _ACCENTED)
    ):
        return None
    return frozenset(c.lower() if len(c.lower()) == 1 else "i" for c in far) if len(scripts) == 1 else None


@lru_cache(4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split()[0] if not letter.isascii() and letter not in "ªº" else "LATIN"


def _fewest(words: Counter[frozenset[str]]) -> int | None:
    """How many alphabets hold all the letters of nearly all words, the one that adds most first."""
    left, most = words, (1 - ENOUGH) * words.total()
    for count in range(MOST + 1):
        if left.total() <= most:
            return count
        covers = {name: {w for w in left if w <= letters} for name, letters in ALPHABETS.items()}
        best = max(covers, key=lambda name: sum(left[w] for w in covers[name]))
        left = Counter({w: n for w, n in left.items() if w not in covers[best]})
    return None


def _wide(text: str, codec: str) -> int | None:
    """1 where characters are those of the language's common ones, or kana; 2 where only some are."""
    standard, lead = COMMON[codec]
    common = all_of = 0
    for char in text:
        if not char.isascii() and (known := _is_common(char, standard, lead)) is not None:
            all_of, common = all_of + 1, common + known
    if _LONE.search(text) or "\ufffd" in text:
        return None
    share = common / all_of if all_of else 0.5
    return 1 if share >= MOST_COMMON else 2 if share >= 0.5 else None


_LONE = re.compile(r"[a-z][^\x00-\x7f]{1,2}[a-z]")  # no language writes so: it痴 for it’s


@lru_cache(1 << 15)
def _is_common(char: str, standard: str, lead: range) -> bool | None:
    """Whether it is a common character of the standard; None for signs, of which nothing is told."""
    if "\u3041" <= char <= "\u30ff":
        return standard == "euc_jp" or None
    if not char.isalpha() or "\uff00" <= char <= "\uffef":
        return None
    try:
        return char.encode(standard)[0] in lead
    except UnicodeEncodeError:
        return False
