"""A random share of a table's rows, for a trial on part of the data."""

from __future__ import annotations

import hashlib
from math import isclose

from luthier.data.table import Table
from luthier.errors import DataError


def sampled(table: Table, ratio: float, size: int | None, seed: int) -> Table:
    """``ratio`` of the rows, or ``size`` of them, drawn by ``seed`` and kept in the table's order; the count is noted.

    Raises DataError ``data-split`` where no row would be left.
    """
    count = len(table) if isclose(ratio, 1.0) else round(ratio * len(table))
    count = count if size is None else min(count, size)
    if size is not None and size >= len(table) and count == len(table):
        told = f"preprocessing.sample_size is {size:,}, and there are {len(table):,} rows: all are used"
        return Table(table.rows, table.name, [*table.notes, told], hashes=table.__dict__.get("_hashes"))
    if count == len(table):
        return table
    if not count:
        raise DataError(
            "data-split",
            f"no row of {table.name} is left after sampling",
            where="preprocessing.sample_ratio",
            received=f"{ratio:g} of {len(table):,} rows",
            allowed="a share that leaves a row",
            fix="raise sample_ratio, or leave it out",
        )
    import numpy as np

    begun = int.from_bytes(hashlib.sha256(f"sample {seed}".encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(begun)).permutation(len(table))[:count]
    part = table.select(sorted(drawn.tolist()))
    told = f"a random sample of {count:,} of {len(table):,} rows is used, and rows are numbered within it"
    return Table(part.rows, f"{table.name} (sample)", [*table.notes, told])
