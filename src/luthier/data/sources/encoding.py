"""Bytes to text: byte order marks first, then UTF-8, then what charset-normalizer finds; a doubt is an error.

A wrong guess would train the model on garbage without a word, so an encoding is taken only when the other readings
of the same bytes are clearly worse.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from luthier.data.sources.formats import unreadable
from luthier.data.sources.legible import languages
from luthier.errors import DataError

# UTF-32 before UTF-16: its mark begins with UTF-16's.
MARKS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BINARY: tuple[tuple[bytes, str], ...] = (  # what other files begin with, and no text does
    (b"PK\x03\x04", "a zip archive or an Excel workbook: unpack it, or call it .xlsx"),
    (b"\x1f\x8b", "packed with gzip: unpack it"),
    (b"PAR1", "Parquet: call it .parquet"),
    (b"ARROW1\0\0", "Arrow: call it .arrow"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook from before 2007: save it as .xlsx"),
    (b"%PDF-", "a PDF: make a table of it"),
)
MARGIN = 0.08  # how much worse the next reading must be, in charset-normalizer's measure, for the best to be taken
SMALL = 16 << 20  # bytes of a file that is simply read whole
SAMPLE = 256 << 10  # bytes that are looked at to tell an encoding


def decode(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """The text of ``data`` and the encoding it was read as. Raises DataError ``data-encoding``."""
    _refuse_binary(data, name)
    if encoding is not None:
        return _strict(data, name, _known(encoding, name)), encoding
    for mark, codec in MARKS:
        if data.startswith(mark):
            return _strict(data, name, codec), codec
    wide = _utf16_without_mark(data)
    if wide:
        return _strict(data, name, wide), wide
    shifted = _seven_bits(data)
    if shifted:
        return _strict(data, name, shifted), shifted
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        if _mostly_utf8(data):
            raise _invalid(data, name, "utf-8", error) from error
    chosen = _detect(data, name)
    return _strict(data, name, chosen), chosen


def codec_of(path: Path, name: str, encoding: str | None = None) -> str:
    """The encoding that a whole file is valid in, found without holding it. Raises DataError ``data-encoding``."""
    if path.stat().st_size <= SMALL:
        return _known(decode(path.read_bytes(), name, encoding)[1], name)
    with path.open("rb") as stream:
        head = stream.read(4)
        sample = head + stream.read(SAMPLE)
        _refuse_binary(sample, name)
        wide = _utf16_without_mark(sample) or _seven_bits(sample[: sample.rfind(b"\n") + 1])
    marked = next((codec for mark, codec in MARKS if head.startswith(mark)), None)
    codec = _known(encoding, name) if encoding is not None else marked or wide or "utf-8"
    if _is_valid(path, codec):
        return codec
    return _known(decode(path.read_bytes(), name, encoding)[1], name)  # tells where it is wrong, or finds another


def _refuse_binary(data: bytes, name: str) -> None:
    """Raise DataError ``data-unreadable`` for what is no text in any encoding, whatever its name says."""
    for mark, what in BINARY:
        if data.startswith(mark):
            is_, _, fix = what.partition(": ")
            why = f"it is no text but {is_}"
            raise unreadable(name, why, received=f"a file that begins with {mark!r}", allowed="a text file", fix=fix)


def open_text(path: Path, codec: str, newline: str = "") -> io.TextIOWrapper:
    r"""The file as text, its line ends as they are; lines end at any of them, or only at ``newline``."""
    return io.TextIOWrapper(path.open("rb", buffering=1 << 20), encoding=codec, newline=newline)


def _is_valid(path: Path, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)("strict")
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _known(encoding: str, name: str) -> str:
    try:
        codec = codecs.lookup(encoding).name
        b"".decode(codec)
    except LookupError as error:  # also codecs that do not make text, such as hex
        raise DataError(
            "data-encoding",
            f"there is no text encoding named {encoding!r}",
            where=name,
            received=encoding,
            allowed="utf-8, utf-16, cp932, euc_jp, latin-1, and the others of Python's codecs module",
            fix="name one of these, or leave --encoding (preprocessing.encoding) out: it is found out",
        ) from error
    return "utf-8-sig" if codec == "utf-8" else codec


def _strict(data: bytes, name: str, codec: str) -> str:
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        raise _invalid(data, name, codec, error) from error


def _invalid(data: bytes, name: str, codec: str, error: UnicodeDecodeError) -> DataError:
    line = data.count(b"\n", 0, error.start) + 1
    return DataError(
        "data-encoding",
        f"{name} is not valid {codec}: {error.reason}",
        where=f"{name} line {line}, byte {error.start}",
        received=repr(data[max(0, error.start - 10) : error.end + 10]),
        allowed=f"bytes that are text in {codec}",
        fix="mend the bytes there, or name the encoding of the file with --encoding (preprocessing.encoding)",
    )


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 has a zero byte in each ASCII character, nearly always on the same side; text in UTF-8 has none."""
    sample = data[: SAMPLE & ~1]
    low, high = sample[0::2].count(0), sample[1::2].count(0)
    if (len(data) % 2 and len(data) <= SAMPLE) or max(low, high) <= 4 * min(low, high):  # an emoji has one elsewhere
        return None
    codec = "utf-16-le" if high > low else "utf-16-be"
    try:
        text = sample.decode(codec, "strict" if len(data) <= SAMPLE else "ignore")
    except UnicodeDecodeError:
        return None
    if 2 * text.count("\n") < sample.count(b"\n"):  # bytes that end lines would be halves of other characters
        return None
    return codec if all(c in "\t\r\n" or unicodedata.category(c) not in {"Cc", "Cn", "Co"} for c in text) else None


def _seven_bits(data: bytes) -> str | None:
    """ISO-2022-JP, which older mail programs write: all of it is ASCII, so UTF-8 too, and reads as garbage."""
    if b"\x1b$" not in data[:SAMPLE]:  # the escape to characters of two bytes
        return None
    return next((codec for codec in ("iso2022_jp", "iso2022_jp_ext") if _try(data, codec) is not None), None)


def _mostly_utf8(data: bytes) -> bool:
    """Whether this is UTF-8 with damage in a few places: whole multi-byte characters by far outnumber bad bytes."""
    text = data[:SAMPLE].decode("utf-8", "replace")
    bad = text.count("\ufffd")
    whole = sum(1 for c in text if ord(c) > 127) - bad
    return whole > 4 * bad


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read the bytes, and what speaks for it: fewer languages, then less of charset-normalizer's mess."""

    codec: str
    text: str  # of the sample
    languages: int
    badness: float

    def rivals(self, other: Reading, data: bytes) -> bool:
        """Whether the ``other`` could be meant as well, so that a person has to say which it is."""
        if other.languages > self.languages:
            return False
        if other.text == self.text and (len(data) <= SAMPLE or _same(data, self.codec, other.codec)):
            return False
        both_latin = {self.codec, other.codec} <= LATIN  # a few letters differ, which no frequency tells apart
        return both_latin or other.badness < self.badness + MARGIN


def _detect(data: bytes, name: str) -> str:
    """The encoding of bytes that are not UTF-8. Raises with the candidates when two readings are about as good."""
    readings, doubtful = _readings(data)
    rivals = [one for one in readings[1:] if readings[0].rivals(one, data)]
    if readings and not rivals:
        return readings[0].codec
    whole = [
        (one.codec, data.decode(one.codec, "replace")) for one in ([readings[0], *rivals] if readings else doubtful)
    ]
    listed = [(codec, text) for i, (codec, text) in enumerate(whole) if text not in [known for _, known in whole[:i]]]
    if listed:
        candidates = [codec for codec, _ in listed]
        raise DataError(
            "data-encoding",
            f"{name} is not UTF-8, and its encoding cannot be told",
            where=name,
            received="; ".join(f"{codec}: {_excerpt(text, listed[0][1])}" for codec, text in listed[:4]),
            allowed=candidates,
            fix=f"say which it is: --encoding {candidates[0]} (preprocessing.encoding: {candidates[0]})"
            + ("" if readings else ", or another one where none of these reads right"),
        )
    raise DataError(
        "data-encoding",
        f"{name} is not text in any encoding that could be recognised",
        where=name,
        received=repr(data[:40]),
        allowed="text in UTF-8, or in another encoding that is named",
        fix="name the encoding of the file with --encoding (preprocessing.encoding)",
    )


# What is tried, the likelier first: it decides between readings that are the same.
CANDIDATES = ("cp1252", "latin_1", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1251", "koi8_r", "cp1250",
              "iso8859_2", "cp1254", "cp1253")  # fmt: skip
LATIN = {"cp1252", "latin_1", "cp1250", "iso8859_2", "cp1254"}
NOT_JAPANESE_BELOW = 0.15  # share of kana among the characters beyond ASCII; running Japanese has about a half
UNHEARD = 0.2  # badness of a reading that charset-normalizer does not name: beyond its threshold


def _readings(data: bytes) -> tuple[list[Reading], list[Reading]]:
    """Ways to read ``data`` that are language, the best first; and those that are none, for a person to look at."""
    from charset_normalizer import from_bytes

    sample = _telling(data)
    if b"\0" in sample:
        return [], []  # no text of one of these
    for codec in ("cp932", "euc_jp"):  # kana come out of the right one of the two only
        text = _try(sample, codec)
        if text and _kana_share(text) >= NOT_JAPANESE_BELOW:
            return [Reading(codec, text, 1, 0.0)], []
    badness: dict[str, float] = {}
    for match in from_bytes(sample, cp_isolation=list(CANDIDATES)):
        for named in (match.encoding, *match.could_be_from_charset):
            badness.setdefault(named, round(match.chaos - match.coherence / 2, 3))
    found, doubtful = [], []
    for codec in CANDIDATES:
        text = _try(sample, codec)
        if text is not None and (count := languages(text, codec)) is not None:
            found.append(Reading(codec, text, count, badness.get(codec, UNHEARD)))
        elif text is not None and codec in badness:
            doubtful.append(Reading(codec, text, 0, badness[codec]))
    found.sort(key=lambda one: (one.languages, one.badness))  # stable: the likelier first
    return found, sorted(doubtful, key=lambda one: one.badness)


def _same(data: bytes, one: str, other: str) -> bool:
    """Whether the bytes are the same text in both encodings, or none in the other."""
    return data.decode(one, "replace") == data.decode(other, "replace") or _try(data, other) is None


def _telling(data: bytes) -> bytes:
    """The lines that are not ASCII, the first of them where there are many; a smaller file whole."""
    if len(data) <= SAMPLE:
        return data
    lines = (line for line in data.splitlines(keepends=True) if not line.isascii())
    taken = bytearray()
    for line in lines:
        if taken and len(taken) + len(line) > SAMPLE:
            break
        taken += line
    return bytes(taken)


def _try(data: bytes, codec: str) -> str | None:
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        return None


def _kana_share(text: str) -> float:
    wide = re.sub(r"[\x00-\x7f]", "", text)
    return len(re.findall(r"[\u3041-\u30ff]", wide)) / max(1, len(wide))


def _excerpt(text: str, other: str) -> str:
    """A few characters around the first that is read in two ways, so that a person can see which reading is right."""
    differs = (i for i, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    first = next((i for i, c in enumerate(text) if ord(c) > 127), 0)
    at = first if text == other else next(differs, first)
    return repr(text[max(0, at - 8) : at + 12])
