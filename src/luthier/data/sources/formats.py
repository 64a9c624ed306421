"""What every file format shares: the registry by suffix, the options of a reading, and small checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.table import Table
from luthier.errors import DataError
from luthier.registry import Registry

if TYPE_CHECKING:
    import pyarrow as pa


EXPANSION = 100  # times a file's size, that real data does not exceed
INDEX = "__index_level_"  # how pandas names an index that it stored beside the columns
EDGES = re.compile(r"^[\s\ufeff\u200b\u2060]+|[\s\ufeff\u200b\u2060]+$")  # of a heading: blanks, seen or not
CELL = 8  # bytes that a cell takes at least


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a dataset may be before reading stops with ``data-limit``."""

    file_bytes: int = 8 << 30
    field_chars: int = 16 << 20  # one cell of a CSV or TSV file
    unpacked_bytes: int = 512 << 20  # a workbook, unzipped; another file, but a hundred times its size is no bomb
    cells: int = 2_000_000  # of a workbook, merged and empty ones before a sheet's last cell among them
    columns: int = 10_000


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller said about a file: nothing, unless it cannot be told from the file."""

    encoding: str | None = None
    sheet: str | int | None = None
    limits: Limits = field(default_factory=Limits)
    spill: Path | None = None  # where a reader that goes through the file in pieces keeps the rows; None: in memory


def collect(batches: Iterator[pa.RecordBatch], schema: pa.Schema, options: Options) -> pa.Table:
    """Batches of rows as one table: in memory, or in the file ``options.spill``, which is then memory-mapped."""
    import pyarrow as pa

    if options.spill is None:
        return pa.Table.from_batches(list(batches), schema)
    with pa.OSFile(str(options.spill), "wb") as out, pa.ipc.new_file(out, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return mapped(options.spill)


def mapped(path: Path) -> pa.Table:
    """The rows of an Arrow file, which stay on disk until they are looked at."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


Reader = Callable[[Path, str, Options], Table]
FORMATS: Registry[Reader] = Registry("dataset format")  # suffix -> reader(path, name, options)


def read_bytes(path: Path, name: str, options: Options) -> bytes:
    """The file's bytes. Raises DataError ``data-unreadable``, ``data-limit`` or ``data-empty``."""
    check_size(path, name, options)
    try:
        return path.read_bytes()
    except OSError as error:
        raise not_opened(name, error) from error


def check_size(path: Path, name: str, options: Options) -> None:
    """Refuse an empty or an oversized file before reading it."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise not_opened(name, error) from error
    if size == 0:
        raise empty(name, "a file of 0 bytes")
    if size > options.limits.file_bytes:
        raise DataError(
            "data-limit",
            f"{name} is larger than the limit",
            where=name,
            received=f"{size:,} bytes",
            allowed=f"up to {options.limits.file_bytes:,} bytes",
            fix=raise_it("file_bytes", "split the file"),
        )


def check_columns(count: int, name: str, options: Options) -> None:
    """Refuse more columns than a table has: a few bytes of a file make one, and each takes thousands."""
    if count > options.limits.columns:
        raise DataError(
            "data-limit",
            f"{name} has more columns than the limit",
            where=name,
            received=f"{count:,} columns",
            allowed=f"up to {options.limits.columns:,} columns",
            fix=raise_it("columns", "leave out what is no column of a table"),
        )


def check_spread(rows: int, columns: int, path: Path, name: str, options: Options) -> None:
    """Refuse rows that each bring columns of their own: the table would be far larger than what is in the file."""
    size = path.stat().st_size
    most = max(options.limits.unpacked_bytes, size * EXPANSION)
    if rows * columns * CELL > most:
        raise DataError(
            "data-limit",
            f"{name} unpacks to more than the limit: its rows have few columns in common",
            where=name,
            received=f"{rows:,} rows of {columns:,} columns out of {size:,} bytes",
            allowed=f"up to {most:,} bytes, {CELL} for each cell",
            fix=raise_it("unpacked_bytes", "give all rows the same columns"),
        )


def raise_it(limit: str, instead: str) -> str:
    """How to go on where a limit is too low for a file that is trusted."""
    return f"{instead}; or, if you trust the file, raise preprocessing.limits.{limit} (--set)"


def unreadable(
    name: str,
    why: str,
    where: str | None = None,
    *,
    received: Any,
    allowed: str | list[str] | None = None,
    fix: str | None = None,
) -> DataError:
    """A dataset that cannot be read as what it claims to be."""
    message = f"{name} cannot be read: {why}"
    return DataError("data-unreadable", message, where=where or name, received=received, allowed=allowed, fix=fix)


def not_opened(name: str, error: OSError) -> DataError:
    """A file that the system does not give."""
    why = error.strerror or str(error)
    fix = "check that the file is there and that you may read it"
    return unreadable(name, why, received=why, allowed="a file that can be read", fix=fix)


def beginning(path: Path, count: int = 16) -> str:
    """The first bytes of a file, which show what it is instead."""
    with path.open("rb") as stream:
        return f"a file that begins with {stream.read(count)!r}"


def empty(name: str, received: str = "a header and no rows") -> DataError:
    """A dataset without rows."""
    return DataError(
        "data-empty",
        f"{name} holds no data",
        where=name,
        received=received,
        allowed="a table with a header and at least one row",
        fix="add rows to it, or name the file that holds them",
    )


def tidied(table: Table) -> Table:
    """The table without an index that pandas stored in it, with `clean_header`, and with no bytes for values.

    Readers may have seen to some of it already.
    """
    rows, notes = without_index(table.rows)
    titles, more = clean_header(rows.column_names, table.name, table.name)
    rows, still_more = _as_written(rows if titles == rows.column_names else rows.rename_columns(titles))
    new = [note for note in (*notes, *more, *still_more) if note not in table.notes]
    return table if rows is table.rows and not new else Table(rows, table.name, [*table.notes, *new])


def _as_written(rows: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows with text for bytes, and numbers of few digits as they were written before they were stored so; notes.

    As Python writes it the number 0.1 of 4 bytes is 0.10000000149011612, and the text of b"yes" is b'yes'.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    notes = []
    for one in list(rows.schema):
        at, kind = rows.schema.get_field_index(one.name), one.type
        if kind in (pa.float16(), pa.float32()):
            written = rows.column(at).to_numpy().astype(str).astype(float)  # NaN is a missing value
            rows = rows.set_column(at, one.name, pa.array(written))
        elif kind == pa.float64() and (whole := _whole_beside_missing(rows.column(at))) is not None:
            notes.append(
                f"the column {one.name!r} holds whole numbers as {whole}, as pandas stores them beside missing values; "
                f"as Int64, or as text, they stay {whole:.0f}"
            )
        elif pa.types.is_fixed_size_binary(kind) or kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
            try:
                text = pc.cast(pc.cast(rows.column(at), pa.large_binary()), pa.large_string())
                rows = rows.set_column(at, one.name, text)
                notes.append(f"the column {one.name!r} holds bytes, which are read as UTF-8")
            except pa.ArrowInvalid:
                rows = rows.drop_columns([one.name])
                notes.append(f"the column {one.name!r} holds bytes that are no text, and is left out")
    return rows, notes


def _whole_beside_missing(values: pa.ChunkedArray) -> float | None:
    """The first of numbers that are all whole, where some are missing; None for any others."""
    import numpy as np

    numbers = values.to_numpy()
    known = numbers[~np.isnan(numbers)]
    whole = 0 < len(known) < len(numbers) and bool((known == np.floor(known)).all()) and np.isfinite(known).all()
    return float(known[0]) if whole else None


def without_index(rows: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows without an index that pandas stored beside the columns, and a note of it."""
    index = [title for title in rows.column_names if title.startswith(INDEX)]
    return (rows.drop_columns(index), ["the index that pandas stored in it is not a column"]) if index else (rows, [])


def clean_header(names: Sequence[str], name: str, where: str) -> tuple[list[str], list[str]]:
    """Column names without blanks and byte order marks around them, empty ones numbered; and notes.

    Refuses a name that stands twice.
    """
    out, notes = [], []
    for number, raw in enumerate(names, 1):
        title = EDGES.sub("", raw)
        if not title:
            title = f"column_{number}"
            notes.append(f"column {number} has no heading and is called {title!r}")
        elif title != raw:
            found = "blanks" if raw.strip() == title else "blanks or byte order marks"
            notes.append(f"{found} around the heading {title!r} were removed")
        out.append(title)
    twice = sorted(title for title, count in Counter(out).items() if count > 1)
    if twice:
        raise DataError(
            "data-unreadable",
            f"{name} has more than one column of the same name",
            where=where,
            received=twice,
            allowed="each name once",
            fix="rename the columns so that each name stands once",
        )
    return out, notes
