"""Which language a table is in, by script and by frequent words: enough to choose a base model, no more.

py3langid tells 140 languages and hardly errs, but it wants numpy 2, and an install leaves a notebook image's numpy alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.data.table import Table

ROWS, CHARACTERS = 500, 400  # how much is looked at: rows, and characters of each cell
LATIN = "LATIN"
KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH")
# The language that writes most of a script's text, by the word that Unicode's names of its letters begin with.
SCRIPTS: dict[str, str] = {
    "HANGUL": "ko", "CYRILLIC": "ru", "ARABIC": "ar", "HEBREW": "he", "GREEK": "el", "DEVANAGARI": "hi", "BENGALI": "bn",
    "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "GUJARATI": "gu", "GURMUKHI": "pa", "ORIYA": "or",
    "SINHALA": "si", "THAI": "th", "LAO": "lo", "KHMER": "km", "MYANMAR": "my", "GEORGIAN": "ka", "ARMENIAN": "hy",
    "ETHIOPIC": "am",
}  # fmt: skip
# What the script's language writes, where others of the script have letters of their own (Ukrainian, Persian, …).
ALPHABETS = {"CYRILLIC": re.compile("[а-яё]", re.IGNORECASE), "ARABIC": re.compile("[\u0621-\u064a]")}
WORD = re.compile(r"\b[^\W\d_]{2,}\b")  # the e of 1e5 is no word, and one letter is a word of too many languages
FEW = 4  # words; fewer are labels or names, which tell nothing
LEAST = 0.1  # share of the words that the language's frequent ones make up
MARGIN = 1.3  # times the share of the second language
# Latin script. English has the words of programming languages too: code is text that any model has read.
WORDS: dict[str, str] = {
    "en": "the of and to is in that it for was with are this on what be how by an my your you has have had not can cannot please do does did where when why we they at if or from which will would there their who should about been but as all one were more than me us out up into over only its our any some no he she his her him them these those also after before while because want need get got make use help could new hello thanks tell give write"
    " paid pay got bought sold received owes spent booked today tomorrow yesterday monday tuesday wednesday thursday friday saturday sunday january february march july october dollars pounds"
    " def return import class function const let var self else elif true false null none int string public static void select print include",
    "de": "der die und das ist nicht ein eine einen zu den dem des mit von für auf wie ich sie wir im es in kann was wo an sich auch bei nach oder mein meine aus zum zur sind wird am",
    "fr": "le la les et des est un une du que dans pour pas qui vous sur ce je au de en il ne plus par avec mon ma comment quel quelle on sont où votre",
    "es": "el la los las de que en un una es por con para no se del su como al lo mi qué cómo está más cuál dónde puedo son",
    "pt": "os de que do da em um uma para com não por se na no mais as ao dos das meu minha como qual onde você está são posso",
    "it": "il di che la un una per non in con del della sono si gli come le da al mio mia dove quale cosa posso no",
    "nl": "de het een van en is dat niet op te voor met zijn ik je aan wat in was we hoe mijn er ook waar kan naar bij",
    "pl": "na do nie się to jest że jak po co dla od czy gdzie mój moje są mogę jaki by my",
    "cs": "na se je to že jak si do pro ve od co kde jsem jsou být není by mohu jaké můj ale nebo",
    "sv": "och att det en som på är av för med inte jag den till har ett om hur var vad kan min du de mitt",
    "da": "og at det er en på ikke som for med jeg den til af har et hvordan hvor hvad kan min du de der mit have her mig dig efter nogle blev",
    "no": "og at det er en på ikke som for med jeg den til av har et hvordan hvor hva kan min du de der mitt her meg deg etter noen ble",
    "fi": "ja on ei että se mikä miten missä ovat voin minun kun mutta tai hän olen voi joka kuinka onko",
    "hu": "az egy és hogy nem is van ez meg mi hol hogyan be ha de mit kell vagy lehet át",
    "ro": "și să de la în un care este cu nu pe din ce cum mai sunt are pentru unde îmi an",
    "tr": "ve bir bu da de için ile ne mi çok daha gibi olarak var nasıl nerede on her",
    "vi": "là và của có không một cho được trong với người các những này để tôi bạn thế nào đâu gì vào lại",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada adalah ke apa saya bagaimana",
    "sw": "ya wa na ni kwa la za katika cha yako vya hii gani",
}
ROMAJI = (
    "no wa ga wo ni to de mo he kara made desu masu shita suru san kun ne yo ka mada sore kore ashita kyou"  # no code
)
HEADINGS = (  # English ones that tables are often given
    "note notes line text label question answer subject body queue message reply input output prompt completion response"
    " instruction comment review title summary description category sentiment topic name date source target customer"
    " product request email ticket priority tag"
)
GUESS_LEAST = 2  # different English words that a guess needs
SHARED = Counter(word for known in WORDS.values() for word in known.split())


def language_of(table: Table, columns: Sequence[str] | None = None) -> str:
    """The ISO 639-1 code of the language most of the text is in, "" where it is none that is told here.

    Where there is hardly a word (numbers, identifiers, a label or two), it is ``en``.
    """
    return recognised(table, columns)[0]


def recognised(table: Table, columns: Sequence[str] | None = None) -> tuple[str, bool]:
    """`language_of`, and whether it is a guess: notes too short for a language, by English words and headings."""
    text = _text(table, columns)
    if code := _of(text):
        return code, False
    wanted = [c for c in (columns or table.columns) if c in table.columns]
    return ("en", True) if _looks_english(text, wanted) else ("", False)


def _looks_english(text: str, headings: Sequence[str]) -> bool:
    """Plain ASCII under English headings, with more English words than words of any other language."""
    named = [word.lower() for heading in headings for word in WORD.findall(heading.replace("_", " "))]
    words = Counter(word.lower() for word in WORD.findall(text))
    if not text.isascii() or sum(word in HEADINGS.split() for word in named) <= len(named) / 2:
        return False
    english = WORDS["en"].split()
    counts = {code: sum(words[word] for word in known.split()) for code, known in {**WORDS, "": ROMAJI}.items()}
    most = max(count for code, count in counts.items() if code != "en")
    return counts["en"] > MARGIN * most and sum(word in words for word in english) >= GUESS_LEAST


def _text(table: Table, columns: Sequence[str] | None) -> str:
    return unicodedata.normalize("NFC", "\n".join(_cells(table, columns)))


def _of(text: str) -> str:
    """The language of a text by its script, and of Latin script by its words."""
    letters: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            letters[unicodedata.name(letter, "").partition(" ")[0]] += count
    enough = 0.2 * letters.total()  # code and English words stand among the text of any other script
    kana, han = sum(letters.pop(script, 0) for script in KANA), letters.pop("CJK", 0)
    if kana + han > enough:
        return "ja" if kana > 0.05 * (kana + han) else "zh"
    letters.pop(LATIN, None)
    for script, count in letters.most_common(1):
        if count > enough:
            if script in ALPHABETS and len(ALPHABETS[script].findall(text)) < 0.98 * count:
                return ""
            return SCRIPTS.get(script, "")
    return _latin(Counter(word.lower() for word in WORD.findall(text)))


def _latin(words: Mapping[str, int]) -> str:
    """The language by its frequent words; one that several languages have counts for each of them in part."""
    total = sum(words.values())
    shares = {
        code: sum(words.get(word, 0) / SHARED[word] for word in known.split()) / max(total, 1)
        for code, known in WORDS.items()
    }
    best, second = sorted(shares, key=lambda code: -shares[code])[:2]
    if shares[best] > max(LEAST, MARGIN * shares[second]):
        return best
    return "" if total >= FEW else "en"


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
