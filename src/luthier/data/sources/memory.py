"""Datasets that are already in memory: a DataFrame, columns, rows, Arrow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from luthier.data.sources import splits
from luthier.data.sources.formats import clean_header, tidied, unreadable
from luthier.data.table import Table
from luthier.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


Rows = Sequence[Any] | Table


def is_frame(dataset: Any) -> bool:
    """Whether this is a pandas DataFrame; pandas is not imported to find out."""
    return any(c.__name__ == "DataFrame" and c.__module__.split(".")[0] == "pandas" for c in type(dataset).__mro__)


def from_frame(frame: pd.DataFrame, name: str = "DataFrame") -> Table:
    """A DataFrame; None, NaN, NaT and NA are missing, every other value keeps its type. The index is not data."""
    import pandas as pd

    titles, notes = clean_header([str(c) for c in frame.columns], name, name)
    columns: dict[str, list[Any]] = {}
    for position, title in enumerate(titles):
        series = frame.iloc[:, position]
        short = series.dtype in ("float16", "float32")  # 0.1 of 4 bytes is 0.10000000149011612 of 8
        values = [float(str(v)) for v in series.to_numpy()] if short else series.astype(object)
        columns[title] = [None if is_missing(v, pd) else v for v in values]
    if frame.index.name is not None or frame.index.dtype.kind not in "iu":
        called = "" if frame.index.name is None else f" {frame.index.name!r}"
        notes.append(f"the index{called} is not a column; reset_index() makes it one")
    return Table.from_columns(columns, name, notes)


def is_missing(value: Any, pd: Any) -> bool:
    """Whether a cell of a DataFrame is empty; lists, arrays and mappings are values."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def from_mapping(columns: Mapping[str, Any], name: str = "dict") -> Table:
    """A mapping of columns, all of one length; or of splits (``train``, ``test``), each a table."""
    tables = any(is_frame(v) or hasattr(v, "column_names") for v in columns.values())
    named = any if tables else all  # a part such as `unsupervised` beside them is told of
    if columns and named(splits.number(k) is not None and not isinstance(v, str) for k, v in columns.items()):
        parts = {str(k): rows for k, v in columns.items() if (rows := as_rows(v)) is not None}
        if len(parts) == len(columns) and splits.are_parts(parts):
            return from_parts(parts, name)
    if tables:
        allowed = ["train", "validation", "test"]
        raise unreadable(
            name, "it holds tables under names that are no splits", received=[*map(str, columns)], allowed=allowed,
            fix="name them so, or give one of them",
        )  # fmt: skip
    nested = [column for column, values in columns.items() if isinstance(values, Mapping)]
    if nested and len(nested) == len(columns):
        return _labelled(columns, name)
    lists: dict[str, list[Any]] = {}
    for column, values in columns.items():
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
            what = "an object" if isinstance(values, Mapping) else "one value"
            why, fix = f"{column!r} holds {what}, not a column", "give each column a list"
            raise unreadable(name, why, received=values, allowed="a list of values for each column", fix=fix)
        lists[str(column)] = list(values)
    lengths = {column: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "data-ragged",
            f"{name} has columns of different lengths",
            where=name,
            received=str(lengths),
            allowed="columns of one length",
            fix="give every column as many values; None where there is none",
        )
    return Table.from_columns(lists, name)


def _labelled(outer: Mapping[Any, Mapping[Any, Any]], name: str) -> Table:
    """Objects in an object, as pandas writes a frame: columns of labelled values, or labelled rows.

    Labels are numbers unless someone chose them, and names of columns are not; where that does not tell them apart,
    either reading could be meant, and the wrong one is the table transposed.
    """
    inner = dict.fromkeys(label for values in outer.values() for label in values)
    rows_outside, rows_inside = (all(map(_is_number, labels)) for labels in (outer, inner))
    if not inner or rows_outside == rows_inside:
        first, second = _shown(outer), _shown(inner)
        raise unreadable(
            name,
            "it holds objects in an object, and which of their keys are the columns cannot be told",
            received=f"{len(outer)} keys outside ({first}), {len(inner)} inside ({second})",
            allowed=[f"columns {first} with rows {second}", f"rows {first} with columns {second}"],
            fix="write it as a list of objects, one a row: in pandas to_json(PATH, orient='records') or "
            "to_dict('records'), of frame.T where it is the other way round",
        )
    if rows_outside:
        found = from_rows(list(outer.values()), name)
    else:
        found = from_rows([{title: values.get(at) for title, values in outer.items()} for at in inner], name)
    labels = list(map(str, outer if rows_outside else inner))
    plain = labels == list(map(str, range(len(labels))))
    notes = [] if plain else [f"the labels of the rows ({_shown(labels)}) are not a column"]
    return Table(found.rows, name, [*found.notes, *notes])


def _is_number(label: Any) -> bool:
    """Whether this is a row's number, as a frame's index has them."""
    return re.fullmatch(r"-?[0-9]+", str(label)) is not None


def _shown(labels: Iterable[Any]) -> str:
    first = [str(label) for label in islice(labels, 4)]
    return ", ".join(map(repr, first[:3])) + (", …" if len(first) > 3 else "")


def as_rows(value: Any) -> Rows | None:
    """The rows of one part of a dataset, where it is a table of its own."""
    if is_frame(value):
        return from_frame(value)
    if _is_dataset(value):
        return tidied(from_arrow(value))
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else None


def from_parts(parts: Mapping[str, Rows], name: str) -> Table:
    """Rows by the names of their splits, with what is to be told of each part."""
    rows, notes = splits.join(parts)
    told = dict.fromkeys(note for part in parts.values() if isinstance(part, Table) for note in part.notes)
    return from_rows(rows, name, [*told, *notes])


def from_rows(rows: Sequence[Any], name: str = "list", notes: Sequence[str] = (), unit: str = "row") -> Table:
    """A list of mappings; a column that a row lacks is missing there."""
    titles: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                "data-unreadable",
                f"{name} is not a list of objects",
                where=f"{name} {unit} {number}",
                received=row,
                allowed="one object (column: value) for each row",
                fix="write each row as an object, with the columns as its keys",
            )
        titles.update(dict.fromkeys(row))
    return Table.from_columns(_columns(rows, titles, name), name, notes)


def _columns(rows: Sequence[Mapping[Any, Any]], keys: Iterable[Any], name: str) -> dict[str, list[Any]]:
    """The values by column; a key that is no text is called as it is written."""
    by_title: dict[str, list[Any]] = {}
    for key in keys:
        by_title.setdefault(str(key), []).append(key)
    columns: dict[str, list[Any]] = {}
    for title, same in by_title.items():
        if len(same) == 1:
            columns[title] = [row.get(same[0]) for row in rows]
            continue
        found = [[row[key] for key in same if key in row] for row in rows]
        if any(len(values) > 1 for values in found):
            clean_header([title] * len(same), name, name)  # raises: the name stands twice
        columns[title] = [values[0] if values else None for values in found]
    return columns


def _is_dataset(value: Any) -> bool:
    """Whether this is a `datasets.Dataset`; the library is not imported to find out."""
    return hasattr(value, "with_format") and hasattr(value, "column_names") and hasattr(value, "to_list")


def from_arrow(dataset: Any) -> Table:
    """An Arrow table, a ``datasets.Dataset``, or anything that offers the Arrow stream interface (polars, duckdb)."""
    import pyarrow as pa

    from luthier.data.sources import arrow

    name = type(dataset).__name__
    if _is_dataset(dataset):
        dataset = dataset.with_format("arrow")[:]
    if isinstance(dataset, pa.Table) or hasattr(dataset, "__arrow_c_stream__"):
        try:
            rows = pa.table(dataset)
        except pa.ArrowInvalid as error:  # a stream of one column without a name, as a Series offers
            raise DataError(
                "data-unreadable",
                f"a {name} is one column, not a table",
                received=f"a {name}",
                allowed="a table: a DataFrame, a dict of columns, a list of dicts",
                fix="name the column: df[['column']], or series.to_frame()",
            ) from error
        return arrow.from_arrow(rows, name)
    raise DataError(
        "data-unreadable",
        f"a {name} is not a dataset",
        received="None" if dataset is None else dataset,
        allowed="a DataFrame, a dict of columns, a list of dicts, a path, or a hub dataset id",
        fix="pass it as one of these",
    )
