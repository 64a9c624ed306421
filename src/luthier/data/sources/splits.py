"""The names by which datasets call their parts, and joining such parts into one table with a ``split`` column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

NAMES: dict[str, int] = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
SPLIT_COLUMN = "split"


class Rows(Protocol):
    """A list of mappings, or a table of them."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


def number(name: Any) -> int | None:
    """0, 1 or 2 for the name or number of a split (``train``, ``dev``, ``test_sft``, ``2``, 1.0), or None."""
    if isinstance(name, bool):
        return None
    if isinstance(name, (int, float)):
        return int(name) if name in (0, 1, 2) else None
    if not isinstance(name, str):
        return None
    text = name.strip().lower()
    if text in {"0", "1", "2", "0.0", "1.0", "2.0"}:
        return int(text[0])
    return NAMES.get(text, NAMES.get(text.replace("-", "_").split("_")[0]))


def are_parts(parts: Mapping[str, Rows]) -> bool:
    """Whether these are lists of rows, of which some, such as a validation split, may be empty."""
    return any(map(len, parts.values())) and all(isinstance(row, Mapping) for part in parts.values() for row in part)


def join(parts: Mapping[str, Rows]) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of ``parts``, each with its split's number in ``split``; and notes.

    Where one part alone has rows they stay without it: who validates is drawn from them.
    """
    notes, rows = [], []
    known = {name: part for name, part in parts.items() if number(name) is not None} if len(parts) > 1 else parts
    taken = any(SPLIT_COLUMN in row for part in known.values() for row in part)
    alone = sum(map(bool, known.values())) == 1
    for name, part in parts.items():
        if name not in known:
            notes.append(f"the part {name!r} ({len(part)} rows) is neither train, validation nor test: left out")
            continue
        rows += [dict(row) if taken or alone else {**row, SPLIT_COLUMN: number(name)} for row in part]
    if alone:
        return rows, notes
    if taken:
        notes.append("the rows have a column 'split' of their own, which is used; the parts' names are not")
    else:
        notes.append("split by the dataset itself: " + ", ".join(f"{n} {len(p)}" for n, p in known.items()))
    return rows, notes
