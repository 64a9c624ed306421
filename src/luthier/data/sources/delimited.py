"""CSV and TSV. Every cell stays the text it is; an empty cell is a missing value."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from luthier.data.sources.encoding import decode
from luthier.data.sources.formats import FORMATS, Options, clean_header, empty, read_bytes, unreadable
from luthier.data.table import Table
from luthier.errors import DataError, Fault

SHOWN = 10  # ragged rows that are listed before the rest are counted


@FORMATS.register(".csv")
def read_csv(path: Path, name: str, options: Options) -> Table:
    """Comma-separated, or separated by semicolons or tabs where the header has those and no comma."""
    return _read(path, name, options, None)


@FORMATS.register(".tsv", ".tab")
def read_tsv(path: Path, name: str, options: Options) -> Table:
    """Tab-separated."""
    return _read(path, name, options, "\t")


def _read(path: Path, name: str, options: Options, delimiter: str | None) -> Table:
    text, encoding = decode(read_bytes(path, name, options), name, options.encoding)
    if not text.strip():
        raise empty(name, "the file holds only blanks")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise unreadable(name, "it holds NUL bytes, so it is not text", f"{name} line {line}")
    notes = [] if encoding.startswith("utf-8") else [f"read as {encoding}"]
    if delimiter is None:
        delimiter = _delimiter(text)
        if delimiter != ",":
            notes.append(f"separated by {delimiter!r}, not by commas")
    rows, lines = _parse(text, name, delimiter, options.limits.field_chars)
    header, more = clean_header(rows[0], name, f"{name} line {lines[0]}")
    _check_widths(rows, lines, header, name)
    columns = {title: [row[i] or None for row in rows[1:]] for i, title in enumerate(header)}
    if len(rows) == 1:
        raise empty(name)
    return Table.from_columns(columns, name, [*notes, *more])


def _delimiter(text: str) -> str:
    line = next(line for line in text.splitlines() if line.strip())
    line = "".join(line.split('"')[::2])  # what stands outside quotes
    return "," if "," in line else max((";", "\t"), key=line.count) if ";" in line or "\t" in line else ","


def _parse(text: str, name: str, delimiter: str, field_chars: int) -> tuple[list[list[str]], list[int]]:
    """The records that are not blank lines, and the line on which each begins."""
    rows, lines, line = [], [], 1
    before = csv.field_size_limit(min(field_chars, 2**31 - 1))  # the csv module has one limit for the process
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            if row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            raise DataError(
                "data-limit",
                f"a field of {name} is longer than the limit",
                where=f"{name} line {line}",
                allowed=f"up to {field_chars:,} characters",
                fix="look for a quote that is never closed, or shorten the field",
            ) from error
        raise unreadable(
            name,
            str(error),
            f"{name}, the record that begins on line {line}",
            'close the quote; a quote inside a quoted field is written twice: ""',
        ) from error
    finally:
        csv.field_size_limit(before)
    return rows, lines


def _check_widths(rows: list[list[str]], lines: list[int], header: list[str], name: str) -> None:
    ragged = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if not ragged:
        return
    faults = [
        Fault(
            "data-ragged",
            f"a row has {len(rows[i])} fields, the header has {len(header)}",
            where=f"{name} line {lines[i]}",
            received=",".join(rows[i]),
            allowed=header,
            fix="put quotes around a field that holds the separator, or fill in the missing fields",
        )
        for i in ragged[:SHOWN]
    ]
    if len(ragged) > SHOWN:
        faults.append(Fault("data-ragged", f"and {len(ragged) - SHOWN} more such rows", where=name))
    raise DataError(faults)
