"""A dataset as one immutable table: columns of Arrow, read a row at a time as plain Python values.

Strings are exactly what the source held. A missing value is None. Values that Arrow could only hold by changing
them (objects with differing keys, columns of mixed types) are kept as JSON text inside, marked in the field's
metadata, and come out of `row` as they went in.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError
from luthier.numbers import Written, dumps, loads

if TYPE_CHECKING:
    import pyarrow as pa

JSON_MARK = {b"luthier": b"json"}  # field metadata of a column whose strings are JSON documents
MIN, MAX = -(2**63), 2**63 - 1  # whole numbers that Arrow holds as such
BLOCK = 512  # rows converted to Python at a time
ROW_HASH = 8  # bytes that tell one row's values from another's


class Table:
    """Rows of one dataset, in the order of the source. Never changed after it was made."""

    def __init__(
        self, rows: pa.Table, name: str, notes: Sequence[str] = (), *, hashes: tuple[str, bytes] | None = None
    ) -> None:
        """``name`` is how messages call the dataset: a file's path, a hub id, ``DataFrame``.

        ``hashes``: `content_hash` and `row_hashes`, where they are known already.
        """
        if hashes is not None:
            self.__dict__["_hashes"] = hashes
        self.rows = rows
        self.name = name
        self.notes = tuple(notes)
        self._json = tuple(f.name for f in rows.schema if (f.metadata or {}).get(b"luthier") == b"json")
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]], name: str, notes: Sequence[str] = ()) -> Table:
        """Build from plain Python values, one sequence a column, all of one length."""
        import pyarrow as pa

        fields, arrays = [], []
        for column, values in columns.items():
            array, is_json = column_array(values, column, name)
            fields.append(pa.field(column, array.type, metadata=JSON_MARK if is_json else None))
            arrays.append(array)
        return cls(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), name, notes)

    @property
    def columns(self) -> list[str]:
        """The column names, in order."""
        return list(self.rows.column_names)

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.row(i) for i in range(len(self)))

    def row(self, index: int) -> dict[str, Any]:
        """Row ``index`` (from 0) as plain Python values; a missing value is None."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index // BLOCK
        if self._block[0] != number:
            self._block = (number, self._decode(self.rows.slice(number * BLOCK, BLOCK).to_pylist()))
        return dict(self._block[1][index - number * BLOCK])

    def column(self, name: str) -> list[Any]:
        """All values of one column. Raises DataError ``data-missing-column`` with the nearest name."""
        if name not in self.rows.column_names:
            raise missing_column(name, self.columns, self.name)
        values = self.rows.column(name).to_pylist()
        return [None if v is None else loads(v) for v in values] if name in self._json else [*map(_plain, values)]

    def values(self, name: str) -> Iterator[Any]:
        """The values of one column one after the other, in memory that does not grow with the rows."""
        if name not in self.rows.column_names:
            raise missing_column(name, self.columns, self.name)
        one = Table(self.rows.select([name]), self.name)
        for start in range(0, len(self), BLOCK):
            yield from one._slice(start, BLOCK, name)

    def at(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of one row, without reading those around it."""
        return self._decode(self.rows.select(list(columns)).slice(index, 1).to_pylist())[0]

    def _slice(self, start: int, count: int, name: str) -> list[Any]:
        return [row[name] for row in self._decode(self.rows.slice(start, count).to_pylist())]

    def select(self, indices: Iterable[int]) -> Table:
        """The rows at ``indices``, in that order, as a new table."""
        import pyarrow as pa

        return Table(self.rows.take(pa.array(list(indices), type=pa.int64())), self.name, self.notes)

    @property
    def content_hash(self) -> str:
        """Sha256 over column names, values and order; the same whatever file format held them."""
        return self._hashes[0]

    @property
    def row_hashes(self) -> bytes:
        """`ROW_HASH` bytes a row, of its values: what tells which rows of two tables differ."""
        return self._hashes[1]

    @cached_property
    def _hashes(self) -> tuple[str, bytes]:
        digest, each = hashlib.sha256(_canonical(self.columns)), bytearray()
        for start in range(0, len(self), BLOCK):
            for row in self._decode(self.rows.slice(start, BLOCK).to_pylist()):
                values = _canonical(list(row.values()))
                digest.update(values)
                each += hashlib.blake2b(values, digest_size=ROW_HASH).digest()
        return digest.hexdigest(), bytes(each)

    def _decode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            for name, value in row.items():
                if isinstance(value, float):
                    row[name] = _plain(value)
            for name in self._json:
                if row.get(name) is not None:
                    row[name] = loads(row[name])
        return rows


def missing_column(
    name: str, columns: Sequence[str], table: str, where: str | None = None, *, otherwise: str = ""
) -> DataError:
    """The one wording for a column that is not there: names it, the nearest one, and what there is.

    ``otherwise``: what to do where the table shall not have it.
    """
    from luthier.registry import nearest

    close = nearest(name, list(columns))
    fix = f"did you mean {close!r}?" if close else "name one of the columns above"
    return DataError(
        "data-missing-column",
        f"{table} has no column {name!r}",
        where=where or table,
        received=name,
        allowed=list(columns),
        fix=f"{fix} {otherwise}" if close and otherwise else otherwise or fix,
    )


def _plain(value: Any) -> Any:
    """NaN is how floating columns say that a value is missing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _canonical(value: Any) -> bytes:
    return dumps(value, str, (",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def stacked(tables: Sequence[Table], name: str, notes: Sequence[str] = ()) -> Table:
    """The rows of ``tables`` one after the other, every value as it is; a column that one lacks is missing there."""
    import pyarrow as pa

    titles = dict.fromkeys(title for table in tables for title in table.columns)
    fields, columns = [], []
    for title in titles:
        known = [table.rows.schema.field(title) for table in tables if title in table.columns]
        typed = [field for field in known if not pa.types.is_null(field.type)] or known
        field = typed[0].with_nullable(True)
        if all(one.type == field.type and one.metadata == field.metadata for one in typed):
            parts = [_as(table, title, field.type) for table in tables]
            columns.append(pa.chunked_array([chunk for part in parts for chunk in part.chunks], field.type))
        else:  # Arrow would make one type of them, and 1.0 of 1
            lacking = ([None] * len(table) if title not in table.columns else table.column(title) for table in tables)
            array, is_json = column_array([value for values in lacking for value in values], title, name)
            field = pa.field(title, array.type, metadata=JSON_MARK if is_json else None)
            columns.append(pa.chunked_array([array]))
        fields.append(field)
    return Table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), name, notes)


def _as(table: Table, title: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column of the table, or as many missing values where it has none."""
    import pyarrow as pa

    if title not in table.columns or pa.types.is_null(table.rows.schema.field(title).type):
        return pa.chunked_array([pa.nulls(len(table), kind)])
    return table.rows.column(title)


def kinds_of(values: Iterable[Any]) -> set[type]:
    """The types among ``values`` that are not missing; a whole number beyond 64 bits counts as written text."""
    return {
        Written if type(v) is int and not MIN <= v <= MAX else type(v) for v in map(_plain, values) if v is not None
    }


def column_array(
    values: Sequence[Any], column: str, name: str, kinds: set[type] | None = None
) -> tuple[pa.Array, bool]:
    """An Arrow array of ``values`` and whether it had to be held as JSON text.

    ``kinds``: the types in the whole column, where ``values`` are a part of it.
    """
    import pyarrow as pa

    values = [_plain(v) for v in values]
    whole = kinds is None
    kinds = kinds_of(values) if kinds is None else kinds
    try:
        if not kinds:
            return pa.nulls(len(values)), False
        if kinds <= {str}:
            return pa.array(values, type=pa.large_string()), False
        if kinds == {Decimal} and len({v.as_tuple().exponent for v in values if v is not None}) > 1:
            return pa.array([None if v is None else str(v) for v in values], pa.large_string()), False  # 2 is not 2.00
        if len(kinds) == 1 and not kinds & {dict, list, tuple, set, Written}:
            types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
            return pa.array(values, None if whole else types.get(next(iter(kinds)))), False
        texts = [None if v is None else dumps(v, _jsonable) for v in values]
        return pa.array(texts, type=pa.large_string()), True
    except UnicodeEncodeError as error:
        raise DataError(
            "data-encoding",
            "a value holds half of a surrogate pair, which is not text",
            where=f"{name} column {column}",
            received=ascii(error.object[max(0, error.start - 20) : error.end + 20]),
            allowed="whole characters",
            fix="write the character whole (in JSON both \\uXXXX escapes of the pair)",
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError) as error:
        raise DataError(
            "data-unreadable",
            f"column {column!r} holds values that a table cannot hold: {error}",
            where=f"{name} column {column}",
            received=sorted(k.__name__ for k in kinds),
            allowed="text, numbers, booleans, dates, and lists or objects of these",
            fix="write the values of this column as text",
        ) from error


def _jsonable(value: Any) -> Any:
    """Values that json does not know, as Arrow would give them back: arrays and sets as lists, the rest refused."""
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")  # as in a column of nothing else
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a value of a table")
