"""What makes a row the one that it is, as normalised text and as 64 bits of its hash, for the split."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.data.duplicates import fingerprint, normalised
from luthier.data.sources.splits import SPLIT_COLUMN
from luthier.data.table import Table


def usable(table: Table, apart: Sequence[str | None]) -> list[str]:
    """The columns that say something of a row: not its side, and not what it is grouped or ordered by."""
    return [c for c in table.columns if c != SPLIT_COLUMN and c not in apart] or table.columns


def key_columns(
    table: Table, target: str | None, columns: Sequence[str] | None, apart: Sequence[str | None]
) -> list[str]:
    """The columns that make a row what it is."""
    if columns:
        return [c for c in columns if c in table.columns]
    return [c for c in usable(table, apart) if c != target]


def varying(table: Table, columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that do not hold one value in all rows, such as one instruction; all where each does."""
    return [c for c in columns if not _is_constant(table.values(c))] or list(columns)


def _is_constant(values: Iterator[Any]) -> bool:
    first = next(values, None)
    return all(value == first for value in values)


def texts(table: Table, columns: Sequence[str]) -> Iterator[str]:
    """Each row's normalised text over ``columns``."""
    if not columns:
        return iter([""] * len(table))
    parts = (map(text, table.values(column)) for column in columns)
    return (normalised("\n".join(values)) for values in zip(*parts, strict=True))


def text_at(table: Table, columns: Sequence[str], row: int) -> str:
    """The normalised text of one row over ``columns``."""
    return normalised("\n".join(map(text, table.at(row, columns).values())))


def keys(table: Table, columns: Sequence[str]) -> array[int]:
    """The fingerprint of each row's text over ``columns``; 0 where it is empty."""
    return array("Q", map(fingerprint, texts(table, columns)))


def value_keys(table: Table, column: str) -> array[int]:
    """The fingerprint of each row's value; 0 where there is none."""
    return array("Q", (0 if is_blank(v) else fingerprint(text(v)) for v in table.values(column)))


def is_blank(value: Any) -> bool:
    """Whether a cell has no value: it is missing, or text of blanks."""
    return value is None or (isinstance(value, str) and not value.strip())


def distinct(keys: array[int]) -> int:
    """How many different fingerprints there are."""
    import numpy as np

    return len(np.unique(np.frombuffer(keys, dtype="u8"))) if keys else 0


def leaked(sides: Sequence[int], keys: array[int]) -> int:
    """Rows outside train that repeat a row in train."""
    import numpy as np

    here, found = np.array(sides, np.int8), np.frombuffer(keys, dtype="u8") if keys else np.empty(0, "u8")
    train = found[(here == 0) & (found != 0)]
    return int(np.isin(found[here != 0], train).sum())


def text(value: Any) -> str:
    """A value as it is compared and grouped by."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
