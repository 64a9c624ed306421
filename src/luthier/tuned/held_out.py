"""Which rows of a table that is named for an evaluation are compared, and whether the run has trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier import events
from luthier.data import rowkeys
from luthier.data.sources.splits import SPLIT_COLUMN
from luthier.data.split import split_column
from luthier.data.table import ROW_HASH, Table
from luthier.run.folder import read_record
from luthier.run.inputs import RECORD, ROWS

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned

_NAMES = {2: "test", 1: "validation"}


@dataclass(frozen=True)
class Picked:
    """Rows of a table, and whether it is known that the run has trained on none of them."""

    rows: Sequence[int]
    held_out: bool


def held_out(splits: Sequence[int]) -> list[int]:
    """The test rows; where there are none, the validation rows."""
    for wanted in _NAMES:
        rows = [i for i, number in enumerate(splits) if number == wanted]
        if rows:
            return rows
    return []


def picked(tuned: Tuned, table: Table, sink: events.Sink = events.silent) -> Picked:
    """The rows of ``table`` to compare on: its held-out ones where it is the training's, or says which; else all.

    Which were taken, and how many of them the run has trained on, is told. Raises DataError for a split column with
    values that name no split.
    """
    own = tuned.sides_of(table)
    if own is not None:
        if not (rows := held_out(own)):
            sink(events.Warned(text=f"{table.name} is the table of the training, which left no row for validation or "
                                    "test: all rows are compared, and all were trained on"))  # fmt: skip
            return Picked(range(len(table)), False)
        told = f"{table.name} is the table of the training: its {len(rows):,} {_NAMES[own[rows[0]]]} rows are compared"
        sink(events.Note(text=told))
        return Picked(rows, True)
    column, declared = side_column(tuned), tuned.config.preprocessing.split.type in ("auto", "fixed")
    given = split_column(table, column) if declared else None
    rows = held_out(given) if given is not None else []
    if given is not None and rows:
        told = f"the column {column!r} of {table.name} says so: its {len(rows):,} {_NAMES[given[rows[0]]]} rows"
        sink(events.Note(text=f"{told} are compared, of {len(table):,}"))
    chosen: Sequence[int] = rows or range(len(table))
    where, seen = _seen(tuned, table, chosen, given)
    if seen:
        sink(events.Warned(text=f"{seen:,} of the {len(chosen):,} rows of {table.name} that are compared stand in "
                                f"{where}: their scores flatter the model. Without --dataset (dataset=…) the run's "
                                "own held-out rows are compared"))  # fmt: skip
    return Picked(chosen, bool(rows) and seen == 0)


def side_column(tuned: Tuned) -> str:
    """The column that says on which side a row stands, as the config names it."""
    split = tuned.config.preprocessing.split
    return split.column if split.type == "fixed" and split.column else SPLIT_COLUMN


def _seen(tuned: Tuned, table: Table, rows: Sequence[int], given: Sequence[int] | None) -> tuple[str, int | None]:
    """Where rows were looked for, and how many of them stand there; None where that is not known.

    The run's table itself tells which rows were trained on. Without it, the hashes in its folder tell which rows it
    had, and on which side only where a column says so (``given``), which is hashed with the row.
    """
    training, splits = tuned.table, tuned.splits
    if training is not None and splits is not None:
        layout = tuned.layout
        names = [one for one in (*layout.inputs, layout.target, layout.system) if one is not None]
        names = [one for one in names if one in training.columns and one in table.columns]
        at = np.array(rows, np.int64)
        known, now = (np.array(rowkeys.keys(one, names), "u8") for one in (training, table))
        return "the rows that the run was trained on", int(np.isin(now[at], known[np.array(splits) == 0]).sum())
    if tuned.folder is None or not (tuned.folder / ROWS).is_file() or not (tuned.folder / RECORD).is_file():
        return "", None
    if list(read_record(tuned.folder / RECORD).get("columns", ())) != table.columns:  # each row is another one
        return "", None
    known, now = (np.frombuffer(one, f"u{ROW_HASH}") for one in ((tuned.folder / ROWS).read_bytes(), table.row_hashes))
    at = np.array([i for i in rows if given is None or given[i] == 0], np.int64)
    where = "the table of the training" + (", of which a part was held out" if given is None else "")
    return where, int(np.isin(now[at], known).sum())
