"""Rows of a table that are near duplicates, told by what distinguishes them: not by what all of them share."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.data import rowkeys
from luthier.data.duplicates import beginning, near_pairs
from luthier.data.table import Table


def near_rows(table: Table, columns: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of rows nearly alike over ``columns``, as `near_pairs` gives them; and what is told of a common form.

    A column with one value for all rows, such as an instruction, and what all rows begin with, such as a system prompt,
    make no two of them alike.
    """
    own = rowkeys.varying(table, columns)
    shared = beginning(rowkeys.texts(table, own))
    notes = []
    if shared:
        notes.append(f"all rows begin with {shared[:40]!r}…: a common form, which makes none of them near duplicates")
    pairs, alike = near_pairs(
        (text.removeprefix(shared) for text in rowkeys.texts(table, own)),
        lambda row: rowkeys.text_at(table, own, row).removeprefix(shared),
        len(table),
    )
    if alike:
        notes.append(f"{alike} rows are nearly alike; taken as a common form, not as duplicates of each other")
    return pairs, notes
