"""CSV and TSV. Every cell stays the text it is; an empty cell is a missing value."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.data.sources.encoding import codec_of, open_text
from luthier.data.sources.formats import (
    FORMATS,
    Options,
    check_columns,
    check_size,
    clean_header,
    collect,
    empty,
    raise_it,
    unreadable,
)
from luthier.data.table import Table
from luthier.errors import DataError, Fault

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096  # records turned into columns together
SHOWN = 10  # ragged rows that are listed before the rest are counted
SAMPLE = 256 << 10  # characters that are looked at to tell the separator
MARKS = ",;\t|"
QUOTED = re.compile(r'(?<![^,;\t|\r\n])"[^"]*(?:""[^"]*)*(?:"|\Z)')  # a field in quotes, whichever mark separates
IN_TEXT = re.compile(r",(?=\s)|(?<=[0-9]),(?=[0-9])")  # commas as text and numbers have them
NAMED = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)  # the line by which Excel is told the separator


@FORMATS.register(".csv")
def read_csv(path: Path, name: str, options: Options) -> Table:
    """Comma-separated, or by the semicolons, tabs or upright bars that stand more evenly in header and rows."""
    return _read(path, name, options, None)


@FORMATS.register(".tsv", ".tab")
def read_tsv(path: Path, name: str, options: Options) -> Table:
    """Tab-separated."""
    return _read(path, name, options, "\t")


def _read(path: Path, name: str, options: Options, delimiter: str | None) -> Table:
    """Twice through the file in pieces: is it valid text, then its records."""
    import pyarrow as pa

    check_size(path, name, options)
    codec = codec_of(path, name, options.encoding)
    notes = [] if codec.startswith("utf-8") else [f"read as {codec}"]
    with open_text(path, codec) as text:
        named = NAMED.fullmatch(text.readline(16))
    if named:
        delimiter = named[1]
        notes.append(f"separated by {delimiter!r}, as line 1 says for Excel, which is no row")
    elif delimiter is None:
        delimiter = _delimiter(path, name, codec)
        if delimiter != ",":
            notes.append(f"separated by {delimiter!r}, not by commas")
    records = _filled(_records(path, name, codec, delimiter, options.limits.field_chars, skipped=1 if named else 0))
    line, first = next(records, (0, None))
    if first is None:
        raise empty(name, "a file of blanks")
    check_columns(len(first), name, options)
    header, more = clean_header(first, name, f"{name} line {line}")
    schema = pa.schema([(title, pa.large_string()) for title in header])
    rows = collect(_batches(records, header, schema, name), schema, options)
    if not rows.num_rows:
        raise empty(name)
    return Table(rows, name, [*notes, *more])


def _batches(
    records: Iterator[tuple[int, list[str]]], header: list[str], schema: pa.Schema, name: str
) -> Iterator[pa.RecordBatch]:
    """The records as columns of text; every ragged one is looked for before the error is raised."""
    import pyarrow as pa

    ragged: list[Fault] = []
    wrong = 0
    while block := list(islice(records, BATCH)):
        for line, record in block:
            if len(record) != len(header):
                wrong += 1
                if wrong <= SHOWN:
                    ragged.append(_ragged(record, header, f"{name} line {line}"))
        if not wrong:
            columns = zip(*(record for _, record in block), strict=True)
            yield pa.record_batch(
                [pa.array([cell or None for cell in cells], pa.large_string()) for cells in columns], schema=schema
            )
    if wrong > SHOWN:
        ragged.append(
            Fault("data-ragged", f"and {wrong - SHOWN} more such rows", name, f"{wrong:,} rows", header, "as above")
        )
    if ragged:
        raise DataError(ragged)


def _ragged(record: list[str], header: list[str], where: str) -> Fault:
    return Fault(
        "data-ragged",
        f"a row has {len(record)} fields, the header has {len(header)}",
        where=where,
        received=",".join(record),
        allowed=header,
        fix="put quotes around a field that holds the separator, or fill in the missing fields",
    )


def _delimiter(path: Path, name: str, codec: str) -> str:
    """The mark that stands in every row as often as in the header. Raises DataError where two marks do."""
    with open_text(path, codec) as text:
        header = next((line for line in text if line.strip()), None)
        if header is None:
            raise empty(name, "a file of blanks")
        sample = header + text.read(SAMPLE)
        whole = not text.read(1)
    lines = [line for line in re.split(r"[\r\n]+", QUOTED.sub("", sample)) if line.strip()]
    header, *rows = lines if whole or len(lines) < 3 else lines[:-1]
    if not any("|" in row for row in rows[:1]):  # a heading may hold a bar; a table of them has one in every row
        header = header.replace("|", "")
    counts = {mark: header.count(mark) for mark in MARKS if mark in header}
    if len(counts) < 2 or not rows:
        return "," if "," in counts else max(counts, key=counts.__getitem__, default=",")
    fits = {mark: sum(row.count(mark) == count for row in rows) / len(rows) for mark, count in counts.items()}
    even = [mark for mark, fit in fits.items() if fit == 1]
    best = max(even, key=counts.__getitem__) if even else max(fits, key=fits.__getitem__)
    if even:
        doubted = [mark for mark in even if counts[mark] == counts[best]]
        if best != "," and fits.get(",", 0) >= 0.5 and any("," in IN_TEXT.sub("", line) for line in lines):
            doubted = [",", *(mark for mark in doubted if mark != ",")]
    else:
        doubted = [mark for mark, fit in fits.items() if fit >= min(0.5, fits[best])]
    if len(doubted) < 2:
        return best
    raise unreadable(
        name,
        "what separates its fields cannot be told",
        received="; ".join(f"{mark!r}: {counts[mark] + 1} columns" for mark in doubted),
        allowed=[f"sep={mark}" for mark in doubted],
        fix=f"write the one it is above the header, as a line of its own: sep={doubted[0]}",
    )


def _filled(records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """The records without the lines of blanks at the end; elsewhere such a line may be a row that lost its fields."""
    held: list[tuple[int, list[str]]] = []
    for line, record in records:
        if len(record) == 1 and not record[0].strip() and len(held) < BATCH:
            held.append((line, record))
            continue
        yield from held
        held.clear()
        yield line, record


def _records(
    path: Path, name: str, codec: str, delimiter: str, field_chars: int, skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank lines, after ``skipped`` lines, each with the line on which it begins."""
    line = 1 + skipped
    before = csv.field_size_limit(min(field_chars, 2**31 - 1))  # the csv module has one limit for the process
    try:
        with open_text(path, codec) as text:
            lines = islice(_without_nul(text, name), skipped, None)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1 + skipped
    except csv.Error as error:
        if "field larger" in str(error):
            raise DataError(
                "data-limit",
                f"a field of {name} is longer than the limit",
                where=f"{name} line {line}",
                received=f"more than {field_chars:,} characters",
                allowed=f"up to {field_chars:,} characters",
                fix=raise_it("field_chars", "look for a quote that is never closed"),
            ) from error
        raise unreadable(
            name,
            str(error),
            f"{name}, the record that begins on line {line}",
            received=_line(path, codec, line),
            allowed="fields, or fields in quotes that are closed before the next separator or line end",
            fix='close the quote; a quote inside a quoted field is written twice: ""',
        ) from error
    finally:
        csv.field_size_limit(before)


def _without_nul(lines: Iterable[str], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise unreadable(
                name,
                "it holds NUL bytes, so it is not text",
                f"{name} line {number}",
                received=repr(line[max(0, line.index("\0") - 20) :][:40]),
                allowed="text without NUL bytes",
                fix="export the table again as CSV in UTF-8; a file in UTF-16 begins with its byte order mark",
            )
        yield line


def _line(path: Path, codec: str, number: int) -> str:
    with open_text(path, codec) as text:
        return next(islice(text, number - 1, None), "").rstrip("\r\n")
