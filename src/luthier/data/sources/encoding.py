"""Bytes to text: byte order marks first, then UTF-8, then what charset-normalizer finds; a doubt is an error.

A wrong guess would train the model on garbage without a word, so an encoding is taken only when the other readings
of the same bytes are clearly worse.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from pathlib import Path

from luthier.errors import DataError

# UTF-32 before UTF-16: its mark begins with UTF-16's.
MARKS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MARGIN = 0.08  # how much worse the next reading must be, in charset-normalizer's measure, for the best to be taken
SMALL = 16 << 20  # bytes of a file that is simply read whole
SAMPLE = 256 << 10  # bytes that are looked at to tell an encoding


def decode(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """The text of ``data`` and the encoding it was read as. Raises DataError ``data-encoding``."""
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
        wide = _utf16_without_mark(sample) or _seven_bits(sample[: sample.rfind(b"\n") + 1])
    marked = next((codec for mark, codec in MARKS if head.startswith(mark)), None)
    codec = _known(encoding, name) if encoding is not None else marked or wide or "utf-8"
    if _is_valid(path, codec):
        return codec
    return _known(decode(path.read_bytes(), name, encoding)[1], name)  # tells where it is wrong, or finds another


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
    """UTF-16 has a zero byte in each ASCII character, always on the same side; text in UTF-8 has none."""
    sample = data[: SAMPLE & ~1]
    low, high = sample[0::2].count(0), sample[1::2].count(0)
    if (len(data) % 2 and len(data) <= SAMPLE) or not (low or high) or (low and high):
        return None
    codec = "utf-16-le" if high else "utf-16-be"
    try:
        text = sample.decode(codec, "strict" if len(data) <= SAMPLE else "ignore")
    except UnicodeDecodeError:
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


def _detect(data: bytes, name: str) -> str:
    """The encoding of bytes that are not UTF-8. Raises with the candidates when two readings are about as good."""
    readings = _readings(data)
    if readings:
        best = readings[0]
        rivals = [r for r in readings[1:] if r[0] < best[0] + MARGIN and r[2] != best[2]]
        if not rivals:
            return best[1]
        candidates = [best[1], *(r[1] for r in rivals)]
        shown = "; ".join(f"{r[1]}: {_excerpt(r[2])}" for r in (best, *rivals)[:3])
        raise DataError(
            "data-encoding",
            f"{name} is not UTF-8, and its encoding cannot be told",
            where=name,
            received=shown,
            allowed=candidates,
            fix=f"say which it is: --encoding {candidates[0]} (preprocessing.encoding: {candidates[0]})",
        )
    raise DataError(
        "data-encoding",
        f"{name} is not text in any encoding that could be recognised",
        where=name,
        received=repr(data[:40]),
        allowed="text in UTF-8, or in another encoding that is named",
        fix="name the encoding of the file with --encoding (preprocessing.encoding)",
    )


# What is tried, the likelier first: it decides between readings that are equally good.
CANDIDATES = ("cp1252", "latin_1", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1251", "koi8_r", "cp1250")
SIBLINGS = {"cp1252", "latin_1", "cp1250"}  # Western before Central European where nothing tells them apart
NOT_JAPANESE_BELOW = 0.15  # share of kana among the characters beyond ASCII; running Japanese has about a half


def _readings(data: bytes) -> list[tuple[float, str, str]]:
    """Ways to read ``data``: (badness, encoding, text of the sample), the best first."""
    from charset_normalizer import from_bytes

    sample = data if len(data) <= SAMPLE else data[: data.rfind(b"\n", 0, SAMPLE) + 1 or SAMPLE]
    for codec in ("cp932", "euc_jp"):  # kana come out of the right one of the two only
        text = _try(sample, codec)
        if text and _kana_share(text) >= NOT_JAPANESE_BELOW:
            return [(0.0, codec, text)]
    found = []
    for match in from_bytes(sample, cp_isolation=list(CANDIDATES)):
        names = [match.encoding, *match.could_be_from_charset]
        codec = next((c for c in CANDIDATES if c in names), match.encoding)
        found.append((match.chaos - match.coherence / 2, codec, str(match)))
    found.sort(key=lambda r: (round(r[0], 3), CANDIDATES.index(r[1]) if r[1] in CANDIDATES else 99))
    if found and found[0][1] in SIBLINGS:
        found = [found[0], *(r for r in found[1:] if r[1] not in SIBLINGS)]
    return found


def _try(data: bytes, codec: str) -> str | None:
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        return None


def _kana_share(text: str) -> float:
    wide = re.sub(r"[\x00-\x7f]", "", text)
    return len(re.findall(r"[\u3041-\u30ff]", wide)) / max(1, len(wide))


def _excerpt(text: str) -> str:
    """A few characters around the first one beyond ASCII, so that a person can see which reading is right."""
    at = next((i for i, c in enumerate(text) if ord(c) > 127), 0)
    return repr(text[max(0, at - 8) : at + 12])
