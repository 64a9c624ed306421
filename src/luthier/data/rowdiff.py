"""Which rows two tables differ in, told from a few bytes a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from luthier.data.table import ROW_HASH

NAMED = 5  # rows of a kind that are named; the others are counted


def differences(before: bytes, after: bytes) -> list[str]:
    """One line for each kind of difference between two `Table.row_hashes`, with the first rows of it; rows from 0.

    Added rows are numbered as they stand now, removed ones as they stood.
    """
    old, new = (np.frombuffer(one, dtype=f"u{ROW_HASH}") for one in (before, after))
    gone, come = (np.flatnonzero(~np.isin(one, other)) for one, other in ((old, new), (new, old)))
    out = [] if len(old) == len(new) else [f"{len(old):,} rows → {len(new):,}"]
    if len(old) == len(new) and len(gone):
        both = np.intersect1d(gone, come)  # the same place holds another row
        out += _line("changed", both) + _line("removed", np.setdiff1d(gone, both))
        come = np.setdiff1d(come, both)
    else:
        out += _line("removed", gone)
    out += _line("added", come)
    if not out and before != after:
        out.append("the same rows in another order" if np.array_equal(np.sort(old), np.sort(new)) else _REPEATED)
    return out


def columns(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The columns that two tables differ in, or their order."""
    out = [f"column {name!r} is gone" for name in before if name not in after]
    out += [f"column {name!r} is new" for name in after if name not in before]
    return out or (["the columns stand in another order"] if list(before) != list(after) else [])


_REPEATED = "the same rows, some of them another number of times"


def _line(what: str, rows: npt.NDArray[np.intp]) -> list[str]:
    if not len(rows):
        return []
    named = ", ".join(map(str, rows[:NAMED].tolist())) + (" …" if len(rows) > NAMED else "")
    return [f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'} {what}: {named}"]
