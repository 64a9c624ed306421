"""Parquet files, Arrow files, and folders written by ``datasets`` (their Arrow files are read directly)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import json_reader
from luthier.data.sources import splits
from luthier.data.sources.formats import (
    CELL,
    EXPANSION,
    FORMATS,
    Options,
    beginning,
    check_columns,
    check_size,
    clean_header,
    collect,
    raise_it,
    tidied,
    unreadable,
    without_index,
)
from luthier.data.sources.messages import declared
from luthier.data.table import Table, stacked
from luthier.errors import DataError
from luthier.run.atomic import is_inside, leads_out

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096  # rows read together
FEW = 64  # the same of nested ones, whose size is not known before they are read
MAGIC = b"ARROW1\0\0"  # before the stream in the file format


@FORMATS.register(".parquet", ".pq")
def read_parquet(path: Path, name: str, options: Options) -> Table:
    """One Parquet file; values keep their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_size(path, name, options)
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            schema = file.schema_arrow
        check_columns(len(schema), name, options)
        texts = [field.name for field in schema if _is_text(field.type)]
        with pq.ParquetFile(path, memory_map=True, read_dictionary=texts) as file:
            rows = collect(_spread(file, schema, path, name, options), schema, options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fix = "is it complete, and is it Parquet? write it again"
        raise unreadable(name, str(error), received=beginning(path), allowed="a whole Parquet file", fix=fix) from error
    return from_arrow(rows, name)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _spread(file: Any, schema: pa.Schema, path: Path, name: str, options: Options) -> Iterator[pa.RecordBatch]:
    """The rows in batches. Raises DataError ``data-limit`` before a file makes far more of itself than data does.

    One long text that every row names by a number is what makes a gigabyte out of 463 bytes; the footer's sizes are the
    file's own word. So texts come as numbers and a dictionary, whose spread size is known before they are spread; what
    is nested cannot, and comes in few rows at a time.
    """
    import pyarrow as pa

    size = path.stat().st_size
    most, taken = max(options.limits.unpacked_bytes, size * EXPANSION), 0
    flat = not any(pa.types.is_nested(field.type) for field in schema)
    for batch in file.iter_batches(batch_size=BATCH if flat else FEW):
        taken += max(sum(_spread_bytes(column) for column in batch.columns), CELL * batch.num_rows)
        _require_most(taken, most, size, name)
        columns = [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _require_most(taken: int, most: int, size: int, name: str) -> None:
    if taken > most:
        raise DataError(
            "data-limit",
            f"{name} unpacks to more than the limit",
            where=name,
            received=f"more than {taken:,} bytes out of {size:,}",
            allowed=f"up to {most:,} bytes",
            fix=raise_it("unpacked_bytes", "write it again without the long texts that repeat"),
        )


def _spread_bytes(column: pa.Array) -> int:
    """Bytes of the values where each row has its own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(_lengths(column).sum()) if _is_view(column.type) else int(column.nbytes)
    values = column.dictionary
    if pa.types.is_nested(values.type):
        return len(column) * int(values.nbytes)
    if not _is_text(values.type) and not _is_view(values.type):
        return len(column) * CELL
    return int(pc.sum(pa.array(_lengths(values)).take(column.indices)).as_py() or 0)


def _lengths(texts: pa.Array) -> Any:
    """Bytes of each text, [n] int64; 0 of a missing one."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _is_view(texts.type):
        return pc.fill_null(pc.cast(pc.binary_length(texts), pa.int64()), 0).to_numpy()
    views = np.frombuffer(texts.buffers()[1], np.int32).reshape(-1, 4)  # a view begins with its length
    return views[texts.offset : texts.offset + len(texts), 0].astype(np.int64)


def _is_view(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


@FORMATS.register(".arrow", ".feather")
def read_arrow(path: Path, name: str, options: Options) -> Table:
    """One Arrow file, in the stream or the file format."""
    check_size(path, name, options)
    return from_arrow(_ipc(path, name, options), name)


def from_arrow(rows: pa.Table, name: str, notes: list[str] | None = None) -> Table:
    """Arrow rows as a Table: an index stored by pandas is dropped and noted, dictionaries become their values.

    So do classes that `datasets` keeps as numbers.
    """
    import pyarrow as pa

    try:
        rows.validate(full=True)  # that offsets stay inside and text is UTF-8: nothing after this looks again
    except pa.ArrowInvalid as error:
        fix = "is it whole? write it again"
        raise unreadable(name, str(error), received=str(error), allowed="a whole Arrow table", fix=fix) from error
    rows, classes = _with_class_names(rows)
    rows, dropped = without_index(rows)
    titles, more = clean_header(rows.column_names, name, name)
    rows = rows.rename_columns(titles).replace_schema_metadata(None)
    for i, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):
            rows = rows.set_column(i, field.name, rows.column(i).cast(field.type.value_type))
    return Table(rows, name, [*(notes or []), *classes, *dropped, *more])


def _with_class_names(rows: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows with the names of the classes whose numbers they hold (`datasets.ClassLabel`), and what was done.

    A number that has no name (-1 is the usual one of a row without a class) becomes a missing value, and is counted.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    notes = []
    for title, names in _class_names(rows.schema.metadata or {}).items():
        at = rows.schema.get_field_index(title)
        if at < 0 or not pa.types.is_integer(rows.schema.field(at).type):
            continue
        numbers = rows.column(at).cast(pa.int64())
        known = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names)))
        named = pc.take(pa.array(names, pa.large_string()), pc.if_else(known, numbers, pa.scalar(None, pa.int64())))
        rows = rows.set_column(at, title, named)
        strays = named.null_count - numbers.null_count
        without = f"; rows without a class, whose number has no name: {strays:,}" if strays else ""
        notes.append(f"{title!r} holds numbers of classes, read as their names: {', '.join(names[:8])}"
                     f"{', …' if len(names) > 8 else ''}{without}")  # fmt: skip
    return rows, notes


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes of each column that says so in what `datasets` writes beside the schema."""
    try:
        known = json_reader.parse(metadata.get(b"huggingface", b"{}"))
        features = known["info"]["features"]
        named = {title: of["names"] for title, of in features.items() if of.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError):  # written by others, or not as `datasets` does
        return {}
    return {title: names for title, names in named.items() if names and all(isinstance(one, str) for one in names)}


def read_saved(path: Path, name: str, options: Options) -> Table:
    """A folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import pyarrow as pa

    described = path / "dataset_dict.json"
    if not described.is_file():
        if not (path / "state.json").is_file():
            raise DataError(
                "data-unreadable",
                f"the folder {name} was not saved by `datasets`",
                where=name,
                received=sorted(p.name for p in path.iterdir())[:20],
                allowed="a folder with state.json or dataset_dict.json",
                fix="name one file in it instead",
            )
        return from_arrow(_saved_part(path, name, options), name)
    listed = [_inside(part, described, name) for part in _json(described, name).get("splits", [])]
    parts = {part: _saved_part(path / part, name, options) for part in listed}
    known = {part: rows for part, rows in parts.items() if splits.number(part) is not None}
    if len(parts) == 1 or not known:
        if len(parts) != 1:
            why, fix = (
                f"its parts {sorted(parts)} are neither train, validation nor test",
                "name the folder of one part",
            )
            raise unreadable(name, why, received=sorted(parts), allowed=["train", "validation", "test"], fix=fix)
        return from_arrow(next(iter(parts.values())), name)
    notes = [f"the part {p!r} is neither train, validation nor test: left out" for p in parts if p not in known]
    filled = {part: rows for part, rows in known.items() if len(rows)}
    if len(filled) == 1:  # who validates is drawn from its rows
        known = filled
    elif all(splits.SPLIT_COLUMN not in rows.column_names for rows in known.values()):
        known = {
            part: rows.append_column(splits.SPLIT_COLUMN, pa.array([splits.number(part)] * len(rows), pa.int64()))
            for part, rows in known.items()
        }
        notes.append("split by the dataset itself: " + ", ".join(f"{p} {len(r)}" for p, r in known.items()))
    else:
        notes.append("the rows have a column 'split' of their own, which is used; the parts' names are not")
    tables = [tidied(from_arrow(rows, name)) for rows in known.values()]
    more = dict.fromkeys(note for table in tables for note in table.notes)
    return stacked(tables, name, [*notes, *more])


def _saved_part(folder: Path, name: str, options: Options) -> pa.Table:
    import pyarrow as pa

    state = _json(folder / "state.json", name)
    files = [folder / _inside(item["filename"], folder / "state.json", name) for item in state.get("_data_files", [])]
    if not files:
        raise _not_saved(name, "state.json names no data files", folder, "no data files")
    if len(set(files)) < len(files):
        raise _not_saved(name, "state.json names a file twice", folder, ", ".join(file.name for file in files))
    if state.get("_indices_data_files") or any(folder.glob("indices*.arrow")):
        why, allowed = "it holds a selection of rows that was not flattened", "the rows themselves"
        raise unreadable(name, why, received="a list of indices", allowed=allowed, fix="save flatten_indices()")
    tables = [_ipc(file, name, options) for file in files]
    return pa.concat_tables(tables)


def _not_saved(name: str, why: str, where: Path, received: Any) -> DataError:
    """The error for a description that `datasets` would not have written."""
    allowed = "a folder as `save_to_disk` of `datasets` writes it"
    return unreadable(name, why, str(where), received=received, allowed=allowed, fix="save the dataset again")


def _inside(named: Any, where: Path, name: str) -> str:
    """A name of a file that the folder gives, which must lie in it. Raises DataError data-unreadable."""
    if isinstance(named, str) and is_inside(named) and not leads_out(where.parent / named, [where.parent.resolve()]):
        return named
    raise _not_saved(name, f"it names a file outside of itself: {named!r}", where, named)


def _ipc(path: Path, name: str, options: Options) -> pa.Table:
    """The rows of one file. Raises DataError ``data-limit`` before it makes far more of itself than data does.

    The file format is the stream with a list of its parts after it, so both are read as streams: what was measured is
    what is read.
    """
    import pyarrow as pa

    size = path.stat().st_size
    most = max(options.limits.unpacked_bytes, size * EXPANSION)
    try:
        with pa.memory_map(str(path)) as source:
            begin = len(MAGIC) if source.read(len(MAGIC)) == MAGIC else 0
            source.seek(begin)
            taken, count = declared(source)
            _require_most(max(taken, CELL * count), most, size, name)
            source.seek(begin)
            rows = pa.ipc.open_stream(source).read_all()
        columns = rows.columns  # reads their names, which may be no UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        received, fix = beginning(path), "is it whole? write it again"
        raise unreadable(
            name, str(error), str(path), received=received, allowed="a whole Arrow file", fix=fix
        ) from error
    check_columns(rows.num_columns, name, options)
    _refuse_shared_parts(rows, name)
    taken = sum(_spread_bytes(chunk) for column in columns for chunk in column.chunks)
    _require_most(max(taken, CELL * rows.num_rows), most, size, name)
    return rows


def _refuse_shared_parts(rows: pa.Table, name: str) -> None:
    """Types whose rows may all stand for one large value, where that cannot be told before they are spread."""
    import pyarrow as pa

    def inner(kind: pa.DataType) -> Iterator[pa.DataType]:
        for i in range(kind.num_fields):
            yield kind.field(i).type
            yield from inner(kind.field(i).type)

    def shares(kind: pa.DataType, *, nested: bool = True) -> bool:
        view = _is_view(kind) or pa.types.is_dictionary(kind)
        runs = pa.types.is_run_end_encoded(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
        return runs or (nested and view)

    for field in rows.schema:
        if shares(field.type, nested=False) or any(map(shares, inner(field.type))):
            raise unreadable(
                name,
                f"the column {field.name!r} is stored as {field.type}",
                received=str(field.type),
                allowed="plain lists, texts and numbers",
                fix="write it with plain lists and texts",
            )


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json_reader.read(path)
    except ValueError as error:
        raise _not_saved(name, str(error), path, beginning(path)) from error
    if not isinstance(value, dict):
        raise _not_saved(name, "it does not hold an object", path, value)
    return value
