"""Datasets that are already in memory: a DataFrame, columns, rows, Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.sources.formats import clean_header, unreadable
from luthier.data.table import Table
from luthier.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def is_frame(dataset: Any) -> bool:
    """Whether this is a pandas DataFrame; pandas is not imported to find out."""
    return any(c.__name__ == "DataFrame" and c.__module__.split(".")[0] == "pandas" for c in type(dataset).__mro__)


def from_frame(frame: pd.DataFrame, name: str = "DataFrame") -> Table:
    """A DataFrame; None, NaN, NaT and NA are missing, every other value keeps its type. The index is not data."""
    import pandas as pd

    titles, notes = clean_header([str(c) for c in frame.columns], name, name)
    columns: dict[str, list[Any]] = {}
    for position, title in enumerate(titles):
        series = frame.iloc[:, position].astype(object)
        columns[title] = [None if is_missing(v, pd) else v for v in series]
    if frame.index.name is not None:
        notes.append(f"the index {frame.index.name!r} is not a column; reset_index() makes it one")
    return Table.from_columns(columns, name, notes)


def is_missing(value: Any, pd: Any) -> bool:
    """Whether a cell of a DataFrame is empty; lists, arrays and mappings are values."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def from_mapping(columns: Mapping[str, Any], name: str = "dict") -> Table:
    """A mapping of columns, all of one length; or of splits (``train``, ``test``), each a table."""
    from luthier.data.sources import splits

    if columns and all(splits.number(k) is not None and not isinstance(v, str) for k, v in columns.items()):
        parts = {k: as_rows(v) for k, v in columns.items()}
        if all(parts.values()) and all(isinstance(r, Mapping) for part in parts.values() for r in part or []):
            rows, notes = splits.join({k: v or [] for k, v in parts.items()})
            return from_rows(rows, name, notes)
    lists: dict[str, list[Any]] = {}
    for column, values in columns.items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
            why, fix = f"{column!r} holds one value, not a column", "give each column a list"
            raise unreadable(name, why, received=values, allowed="a list of values for each column", fix=fix)
        lists[str(column)] = list(values.values()) if isinstance(values, Mapping) else list(values)
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


def as_rows(value: Any) -> list[Any] | None:
    """The rows of one part of a dataset, where it is a table of its own."""
    if is_frame(value):
        return list(from_frame(value))
    if hasattr(value, "to_list") and hasattr(value, "column_names"):  # datasets.Dataset
        return list(value.to_list())
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else None


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
        titles.update(dict.fromkeys(map(str, row)))
    return Table.from_columns({t: [row.get(t) for row in rows] for t in titles}, name, notes)


def from_arrow(dataset: Any) -> Table:
    """An Arrow table, a ``datasets.Dataset``, or anything that offers the Arrow stream interface (polars, duckdb)."""
    import pyarrow as pa

    name = type(dataset).__name__
    if hasattr(dataset, "to_list") and hasattr(dataset, "column_names"):
        return from_rows(dataset.to_list(), name)
    if isinstance(dataset, pa.Table) or hasattr(dataset, "__arrow_c_stream__"):
        return Table(pa.table(dataset), name)
    raise DataError(
        "data-unreadable",
        f"a {name} is not a dataset",
        received="None" if dataset is None else dataset,
        allowed="a DataFrame, a dict of columns, a list of dicts, a path, or a hub dataset id",
        fix="pass it as one of these",
    )
