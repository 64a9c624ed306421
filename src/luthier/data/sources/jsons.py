"""JSON and JSON Lines. Values keep their types, numbers how they are written; NaN and null are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import json_reader, numbers
from luthier.data.sources import memory, splits
from luthier.data.sources.encoding import codec_of, decode, open_text
from luthier.data.sources.formats import (
    FORMATS,
    Options,
    check_columns,
    check_size,
    check_spread,
    collect,
    empty,
    read_bytes,
    unreadable,
)
from luthier.data.table import JSON_MARK, Table, column_array, kinds_of
from luthier.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096  # rows turned into columns together
SHOWN = 60  # characters of a broken text that are shown
SHAPES = "a list of objects, an object of columns, or one whole object a line"
LINES = "one whole object a line"
MEND = "mend the text there, or write the file again with a JSON library"


@FORMATS.register(".json")
def read_json(path: Path, name: str, options: Options) -> Table:
    """A list of objects, an object of columns, or an object with the list inside; JSON Lines is recognised."""
    text, notes = _text(path, name, options)
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second document after the first
            return _lines(lambda: iter(text.split("\n")), path, name, [*notes, "read as JSON Lines"], options)
        raise _broken(error, f"{name}:{error.lineno}:{error.colno}", name) from error
    except ValueError as error:
        raise unreadable(name, str(error), received=text[:SHOWN], allowed=SHAPES, fix=MEND) from error
    _check_spread(value, path, name, options)
    return _table(value, name, notes)


def _check_spread(value: Any, path: Path, name: str, options: Options) -> None:
    """Bounds of the lists of objects in it, or of its columns."""
    parts = value.values() if isinstance(value, dict) else [value]
    check_columns(len(value) if isinstance(value, dict) else 0, name, options)
    for rows in (part for part in parts if isinstance(part, list)):
        titles = {title for row in rows if isinstance(row, dict) for title in row}
        check_columns(len(titles), name, options)
        check_spread(len(rows), len(titles), path, name, options)


@FORMATS.register(".jsonl", ".ndjson")
def read_jsonl(path: Path, name: str, options: Options) -> Table:
    """One object a line; blank lines are skipped. Goes through the file in pieces."""
    check_size(path, name, options)
    codec = codec_of(path, name, options.encoding)
    notes = [] if codec.startswith("utf-8") else [f"read as {codec}"]
    return _lines(lambda: _lines_of(path, codec), path, name, notes, options)


def _lines_of(path: Path, codec: str) -> Iterator[str]:
    with open_text(path, codec, "\n") as text:  # not any line end: U+2028 and \r may stand inside a JSON string
        yield from text


def _text(path: Path, name: str, options: Options) -> tuple[str, list[str]]:
    text, encoding = decode(read_bytes(path, name, options), name, options.encoding)
    if not text.strip():
        raise empty(name, "a file of blanks")
    return text, [] if encoding.startswith("utf-8") else [f"read as {encoding}"]


def _lines(lines: Callable[[], Iterator[str]], path: Path, name: str, notes: list[str], options: Options) -> Table:
    """Twice through the lines: which columns of which types there are, then the rows."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    count = 0
    for row in _objects(lines(), name):
        count += 1
        for title, value in row.items():
            kinds.setdefault(title, set()).update(kinds_of((value,)))
    if not kinds:
        raise empty(name, "a file of blanks")
    check_columns(len(kinds), name, options)
    check_spread(count, len(kinds), path, name, options)
    sample = {title: column_array([], title, name, found) for title, found in kinds.items()}
    schema = pa.schema(
        [pa.field(t, array.type, metadata=JSON_MARK if is_json else None) for t, (array, is_json) in sample.items()]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        rows = _objects(lines(), name)
        while block := list(islice(rows, BATCH)):
            arrays = [column_array([row.get(t) for row in block], t, name, found)[0] for t, found in kinds.items()]
            yield pa.record_batch(arrays, schema=schema)

    return Table(collect(batches(), schema, options), name, notes)


def _objects(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except json.JSONDecodeError as error:
            raise _broken(error, f"{name}:{number}:{error.colno}", name, LINES) from error
        except ValueError as error:
            raise unreadable(
                name, str(error), f"{name} line {number}", received=line, allowed=LINES, fix=MEND
            ) from error
        if not isinstance(row, dict):
            why = f"a line holds a {type(row).__name__}, not an object"
            fix = "write each row as an object, with the columns as its keys"
            raise unreadable(name, why, f"{name} line {number}", received=line, allowed=LINES, fix=fix)
        yield row


def _broken(error: json.JSONDecodeError, where: str, name: str, allowed: str = SHAPES) -> DataError:
    """The error for a text that is not JSON, with what stands there."""
    line = error.doc.split("\n")[error.lineno - 1]
    received = line[max(0, error.colno - 1 - SHOWN // 2) :][:SHOWN].strip() or "the end of the text"
    return unreadable(name, error.msg, where, received=received, allowed=allowed, fix=MEND)


def _table(value: Any, name: str, notes: list[str]) -> Table:
    if isinstance(value, list):
        if not value:
            raise empty(name, "a list without items")
        return memory.from_rows(value, name, notes, unit="item")
    if not isinstance(value, dict) or not value:
        why, fix = f"it holds a {type(value).__name__}", "write the rows as a list of objects"
        raise unreadable(name, why, received=value, allowed=SHAPES, fix=fix)
    lists = {k: v for k, v in value.items() if isinstance(v, list)}
    if len(lists) == len(value) and any(splits.number(k) is not None for k in lists) and splits.are_parts(lists):
        rows, more = splits.join(lists)
        return memory.from_rows(rows, name, [*notes, *more])
    parts = {k: v for k, v in lists.items() if splits.are_parts({k: v})}
    if (split := _split_orient(value, name)) is not None:
        return memory.from_rows(split, name, notes)
    if len(parts) == 1 and not any(isinstance(v, (list, Mapping)) for k, v in value.items() if k not in parts):
        key, rows = next(iter(parts.items()))
        return memory.from_rows(rows, name, [*notes, f"the rows are the list under {key!r}"])
    table = memory.from_mapping(value, name)
    return Table(table.rows, name, [*notes, *table.notes])


def _split_orient(value: dict[str, Any], name: str) -> list[dict[str, Any]] | None:
    """The rows of what pandas writes with ``orient="split"``: the columns' names, and a list for each row."""
    titles, rows = value.get("columns"), value.get("data")
    if value.keys() - {"index"} != {"columns", "data"} or not isinstance(titles, list) or not isinstance(rows, list):
        return None
    if not all(isinstance(row, list) for row in rows):
        return None
    names = list(map(str, titles))
    wrong = next((row for row in rows if len(row) != len(names)), None)
    if len(set(names)) < len(names) or wrong is not None:
        why, allowed = "its `data` does not fit its `columns`", "columns of different names, and a value of each a row"
        fix = "write the rows as a list of objects"
        raise unreadable(name, why, received=names if wrong is None else wrong, allowed=allowed, fix=fix)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _loads(text: str) -> Any:
    return json_reader.parse(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=numbers.number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"an object has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return out


def _constant(text: str) -> float | None:
    return None if text == "NaN" else float(text)
