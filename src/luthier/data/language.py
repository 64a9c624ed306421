"""Which language a table is in, by script and by frequent words: enough to choose a base model, no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.data.table import Table

ROWS, CHARACTERS = 500, 400  # how much is looked at: rows, and characters of each cell
# Scripts that one large language (or the likeliest of several) writes. Latin is told apart by words.
SCRIPTS: tuple[tuple[str, str], ...] = (
    ("ko", "\uac00-\ud7a3"),
    ("ru", "\u0400-\u04ff"),
    ("ar", "\u0600-\u06ff"),
    ("he", "\u0590-\u05ff"),
    ("el", "\u0370-\u03ff"),
    ("hi", "\u0900-\u097f"),
    ("bn", "\u0980-\u09ff"),
    ("ta", "\u0b80-\u0bff"),
    ("th", "\u0e00-\u0e7f"),
)
KANA = re.compile(r"[\u3041-\u30fa\uff66-\uff9d]")
HAN = re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf]")
LATIN = re.compile(r"\b[^\W\d_]+\b")  # the e of 1e5 is no word
WORDS: dict[str, str] = {
    "en": "the of and to is in that it for was with are this on what be how by an a i my you has have not no can please",
    "de": "der die und das ist nicht ein eine zu den mit von für auf wie ich sie wir",
    "fr": "le la les et des est un une du que dans pour pas qui vous sur ce je au",
    "es": "el la los las de que y en un una es por con para no se del su como",
    "pt": "o os de que e do da em um uma para com não por se na no mais as",
    "it": "il di che la e un una per è non in con del della sono si gli come",
    "nl": "de het een van en is dat niet op te voor met zijn ik je aan wat",
    "pl": "i w na z do nie się to jest że o jak po co dla od czy",
    "tr": "ve bir bu da de için ile ne mi çok daha gibi olarak var nasıl",
    "vi": "là và của có không một cho được trong với người các những này",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada adalah",
}


def language_of(table: Table, columns: Sequence[str] | None = None) -> str:
    """The ISO 639-1 code of the language most of the text is in, ``en`` where nothing says otherwise."""
    text = "\n".join(_cells(table, columns))
    letters = sum(1 for _ in re.finditer(r"[^\W\d_]", text)) or 1
    kana, han = len(KANA.findall(text)), len(HAN.findall(text))
    if kana + han > 0.2 * letters:  # code and English words stand among Japanese text
        return "ja" if kana > 0.05 * (kana + han) else "zh"
    counts = {code: len(re.findall(f"[{span}]", text)) for code, span in SCRIPTS}
    code = max(counts, key=lambda c: counts[c])
    if counts[code] > 0.2 * letters:
        return code
    words = Counter(word.lower() for word in LATIN.findall(text))
    scores = {code: sum(words[w] for w in known.split()) / len(known.split()) for code, known in WORDS.items()}
    best = max(scores, key=lambda c: scores[c])
    return best if scores[best] > scores["en"] else "en"


def _cells(table: Table, columns: Sequence[str] | None) -> list[str]:
    """Text of evenly spread rows; conversations and other nested values as their JSON without escapes."""
    wanted = [c for c in (columns or table.columns) if c in table.columns]
    step = max(1, len(table) // ROWS)
    out: list[str] = []
    for index in range(0, len(table), step):
        row = table.row(index)
        out += [piece[:CHARACTERS] for name in wanted for piece in _strings(row[name])]
    return out


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):  # the turn's words, not the names of its roles
        return [s for key, item in value.items() if key not in ("role", "from") for s in _strings(item)]
    if isinstance(value, (list, tuple)):
        return [s for item in value for s in _strings(item)]
    return []
