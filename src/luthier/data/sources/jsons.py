"""JSON and JSON Lines. Numbers, booleans, lists and objects keep their types; NaN and null are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.data.sources import memory, splits
from luthier.data.sources.encoding import decode
from luthier.data.sources.formats import FORMATS, Options, empty, read_bytes, unreadable
from luthier.data.table import Table


@FORMATS.register(".json")
def read_json(path: Path, name: str, options: Options) -> Table:
    """A list of objects, an object of columns, or an object with the list inside; JSON Lines is recognised."""
    text, notes = _text(path, name, options)
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second document after the first
            return _lines(text, name, [*notes, "read as JSON Lines"])
        raise unreadable(name, error.msg, f"{name}:{error.lineno}:{error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise unreadable(name, str(error)) from error
    return _table(value, name, notes)


@FORMATS.register(".jsonl", ".ndjson")
def read_jsonl(path: Path, name: str, options: Options) -> Table:
    """One object a line; blank lines are skipped."""
    text, notes = _text(path, name, options)
    return _lines(text, name, notes)


def _text(path: Path, name: str, options: Options) -> tuple[str, list[str]]:
    text, encoding = decode(read_bytes(path, name, options), name, options.encoding)
    if not text.strip():
        raise empty(name, "the file holds only blanks")
    return text, [] if encoding.startswith("utf-8") else [f"read as {encoding}"]


def _lines(text: str, name: str, notes: list[str]) -> Table:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except json.JSONDecodeError as error:
            raise unreadable(name, error.msg, f"{name}:{number}:{error.colno}", "one whole object a line") from error
        except (ValueError, RecursionError) as error:
            raise unreadable(name, str(error), f"{name} line {number}") from error
        if not isinstance(row, dict):
            raise unreadable(name, f"a line holds a {type(row).__name__}, not an object", f"{name} line {number}")
        rows.append(row)
    return memory.from_rows(rows, name, notes)


def _table(value: Any, name: str, notes: list[str]) -> Table:
    if isinstance(value, list):
        if not value:
            raise empty(name, "the list has no items")
        return memory.from_rows(value, name, notes, unit="item")
    if not isinstance(value, dict) or not value:
        raise unreadable(name, f"it holds a {type(value).__name__}", fix="a list of objects, or an object of columns")
    parts = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)}
    if parts and len(parts) == len(value) and all(splits.number(k) is not None for k in parts):
        rows, more = splits.join(parts)
        return memory.from_rows(rows, name, [*notes, *more])
    if len(parts) == 1 and not any(isinstance(v, (list, Mapping)) for k, v in value.items() if k not in parts):
        key, rows = next(iter(parts.items()))
        return memory.from_rows(rows, name, [*notes, f"the rows are the list under {key!r}"])
    table = memory.from_mapping(value, name)
    return Table(table.rows, name, [*notes, *table.notes])


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"an object has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return out


def _constant(text: str) -> float | None:
    return None if text == "NaN" else float(text)
