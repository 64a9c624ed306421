"""Which rows train, validate and test: as the table says, or drawn, with what belongs together on one side."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.assets.cache import build_once, code_hash, forget_old, read_made
from luthier.data import rowkeys, shares, unvalidated
from luthier.data.alike import near_rows
from luthier.data.duplicates import Groups
from luthier.data.sources.splits import SPLIT_COLUMN, number
from luthier.data.table import Table
from luthier.data.times import seconds_of
from luthier.errors import DataError
from luthier.registry import Registry
from luthier.types import SPLITS, Split

if TYPE_CHECKING:
    import numpy as np

ALLOWED = "0 or train, 1 or validation, 2 or test"
MANY = 20_000  # rows of a table whose split is worth keeping
FEW_CLASSES, ROWS_PER_CLASS = 50, 5  # when `auto` takes a target for a class


class SplitConfig(Protocol):
    """The `preprocessing.split` section, as far as it is read here."""

    type: Any
    probabilities: Any
    column: str | None
    group: str | None
    seed: int | None


@dataclass(frozen=True, slots=True)
class SplitResult:
    """Where each row stands, how many stand on each side, and what a person should know."""

    rows: list[int]  # the side of each row: 0 train, 1 validation, 2 test
    type: str  # how it was split: fixed, random, stratify, datetime, hash
    counts: Mapping[Split, int]
    notes: tuple[str, ...] = ()
    duplicates: int = 0  # rows that repeat an earlier one
    leaked: int = 0  # rows outside train that repeat a row in train (only when the sides were given)
    why_none: str = ""  # why no row validates

    def of(self, split: Split) -> list[int]:
        """The row numbers of one side, in order."""
        wanted = SPLITS.index(split)
        return [i for i, side in enumerate(self.rows) if side == wanted]


@dataclass(frozen=True, slots=True)
class Job:
    """What a way of splitting works with: the sets of rows that stay together, and the rows that are alone."""

    table: Table
    config: SplitConfig
    units: list[list[int]]
    alone: np.ndarray[Any, Any]
    keys: array[int]  # the fingerprint of each row's text
    shares: tuple[float, float, float]
    seed: int
    target: str | None
    notes: list[str]


METHODS: Registry[Callable[[Job], list[int]]] = Registry("split type")


def assign(
    table: Table,
    split: SplitConfig,
    *,
    seed: int,
    target: str | None = None,
    columns: Sequence[str] | None = None,
    near_duplicates: bool = True,
    cache: Path | None = None,
) -> SplitResult:
    """Put each row on a side.

    ``target`` is the column that is learned (its classes are what `stratify` balances); ``columns`` are those that
    make two rows the same question (None: all but the target); ``cache`` is the folder under which the split of a
    large table is kept. Raises DataError ``data-split`` when no row would train or a given side is unknown,
    ``data-missing-column`` for a column that is not there.
    """
    if cache is None or len(table) < MANY:
        return _assign(table, split, seed, target, columns, near_duplicates)
    declared = [split.type, list(split.probabilities), split.column, split.group, split.seed]
    parts = [table.content_hash, declared, seed, target, columns, near_duplicates, _code()]
    key = hashlib.sha256(json.dumps(parts, ensure_ascii=True, default=str).encode()).hexdigest()[:40]

    def make(folder: Path) -> None:
        found = _assign(table, split, seed, target, columns, near_duplicates)
        (folder / "sides").write_bytes(bytes(found.rows))
        known = asdict(replace(found, rows=[]))
        (folder / "split.json").write_text(json.dumps(known), encoding="utf-8")

    folder = build_once(cache / "splits" / key, make, inf)
    forget_old(folder)
    known = read_made(folder / "split.json")
    return SplitResult(**{**known, "rows": list((folder / "sides").read_bytes()), "notes": tuple(known["notes"])})


def _assign(
    table: Table,
    split: SplitConfig,
    seed: int,
    target: str | None,
    columns: Sequence[str] | None,
    near_duplicates: bool,
) -> SplitResult:
    kind = split.type
    if kind == "auto":
        kind = _automatic(table, split, target)
    notes: list[str] = []
    if kind != "fixed" and SPLIT_COLUMN in table.columns:
        notes.append(f"the column {SPLIT_COLUMN!r} is not used, because preprocessing.split.type is {kind}")
    apart = (split.group, split.column)
    keyed = rowkeys.key_columns(table, target, columns, apart)
    keys = rowkeys.keys(table, keyed)
    if not columns and rowkeys.distinct(keys) < 0.5 * len(table):  # such as a source beside a conversation: look at all
        keyed = rowkeys.usable(table, apart)
        keys = rowkeys.keys(table, keyed)
    groups = Groups(len(table))
    groups.join_equal(keys)
    duplicates = sum(len(one) - 1 for one in groups.sets()[0])
    near = Groups(len(table)) if kind == "datetime" else groups  # moving what is nearly alike would break the order
    pairs: list[tuple[int, int]] = []
    if near_duplicates and kind != "fixed":
        pairs, told = near_rows(table, keyed)
        for one, other in pairs:
            near.join(one, other)
        notes += told
    if kind == "hash" and split.group is None and split.column is not None:
        groups.join_equal(rowkeys.value_keys(table, split.column))
    if split.group is not None:
        named = rowkeys.value_keys(table, split.group)
        groups.join_equal(named)
        if alone := sum(1 for key in named if not key):
            are = "1 row has no value" if alone == 1 else f"{alone:,} rows have no value"
            notes.append(f"{are} in {split.group!r} (preprocessing.split.group): each counts as a group of its own")
    own_seed = seed if split.seed is None else split.seed
    units, single = groups.sets()
    job = Job(table, split, units, single, keys, shares.shares(split.probabilities), own_seed, target, notes)
    sides = METHODS.get(kind, "preprocessing.split.type")(job)
    counts: dict[Split, int] = {name: sides.count(i) for i, name in enumerate(SPLITS)}
    if not counts["train"]:
        raise DataError(
            "data-split",
            f"no row of {table.name} is left to train on",
            where=table.name,
            received=", ".join(f"{name} {n}" for name, n in counts.items()),
            allowed="at least one row in train",
            fix="give more rows, a larger first share in preprocessing.split.probabilities, or mark rows as train",
        )
    leaked = rowkeys.leaked(sides, keys)
    if leaked:
        notes.append(f"{leaked} rows outside train repeat a row in train; scores on them flatter the model")
    if near is not groups and (close := _across(near, sides)):
        notes.append(f"{close} rows outside train nearly repeat a row in train; scores on them flatter the model")
    why = "" if counts["validation"] else unvalidated.why(job, kind, duplicates, len(pairs))
    return SplitResult(sides, kind, counts, tuple(notes), duplicates, leaked, why)


@functools.cache
def _code() -> str:
    here = Path(__file__)
    beside = ("alike", "duplicates", "rowkeys", "shares", "times", "unvalidated")
    return code_hash(here, *(here.with_name(f"{name}.py") for name in beside))


def split_column(table: Table, column: str = SPLIT_COLUMN) -> list[int] | None:
    """The sides that a column gives, None when the table has no such column. Raises DataError ``data-split``."""
    if column not in table.columns:
        return None
    values = table.column(column)
    sides = [number(value) for value in values]
    bad = [i for i, side in enumerate(sides) if side is None]
    if bad:
        raise DataError(
            "data-split",
            f"the column {column!r} holds values that name no split ({len(bad)} rows)",
            where=f"{table.name} row {bad[0]} column {column}",
            received="nothing" if values[bad[0]] is None else values[bad[0]],
            allowed=ALLOWED,
            fix="mend the column, or set preprocessing.split.type to random to split without it",
        )
    return [side for side in sides if side is not None]


@METHODS.register("fixed")
def _fixed(job: Job) -> list[int]:
    column = job.config.column or SPLIT_COLUMN
    sides = split_column(job.table, column)
    if sides is None:
        job.table.column(column)  # raises data-missing-column
    assert sides is not None
    if job.config.group is not None:
        across = sum(1 for unit in job.units if len({sides[row] for row in unit}) > 1)
        if across:
            job.notes.append(f"{across} groups stand on several sides, as the column {column!r} says")
    return sides


@METHODS.register("random")
def _random(job: Job) -> list[int]:
    sides = _sides(job)
    sets = len(job.units) + len(job.alone)
    if sets < sum(1 for share in job.shares if share) and len(sides) >= 10:
        job.notes.append(f"of rows that stay together there are {sets} sets, too few for every split")
    _draw(job, job.units, job.alone, sides, least=1 if len(sides) >= 10 else 0)
    return _listed(sides)


@METHODS.register("stratify")
def _stratify(job: Job) -> list[int]:
    import numpy as np

    column = job.config.column or job.target
    if column is None:
        raise DataError(
            "data-split",
            "a stratified split needs a column with classes",
            where="preprocessing.split.column",
            received="no column, and a target that is no class",
            allowed=job.table.columns,
            fix="set preprocessing.split.column to the column with the classes, or split.type: random",
        )
    labels = np.frombuffer(rowkeys.value_keys(job.table, column), dtype="u8")
    units, alone = job.units, job.alone
    if column == job.target:  # rows without an answer teach nothing and test nothing: they are not divided
        answered = [[row for row in unit if labels[row]] for unit in units]
        units = [unit for unit in answered if len(unit) > 1]
        left = [unit[0] for unit in answered if len(unit) == 1]
        alone = np.sort(np.concatenate([alone[labels[alone] != 0], np.array(left, alone.dtype)]))
    together: dict[int, list[list[int]]] = {}
    for unit in units:
        together.setdefault(Counter(labels[unit].tolist()).most_common(1)[0][0], []).append(unit)
    sides = _sides(job)
    wanted = sum(1 for share in job.shares if share)
    for label in np.unique(labels).tolist():
        sets, single = together.get(label, []), alone[labels[alone] == label]
        if 0 < len(sets) + len(single) < wanted:
            first = sets[0][0] if sets else int(single[0])
            named = f"the class {job.table.at(first, [column])[column]!r}" if label else f"no value in {column!r}"
            job.notes.append(f"{named} has {len(sets) + len(single)} separate rows, too few for every split")
        _draw(job, sets, single, sides, least=1)
    for unit in job.units if column == job.target else ():  # and stand where the row stands that they repeat
        sides[unit] = max(sides[row] for row in unit)
    return _listed(sides)


@METHODS.register("datetime")
def _datetime(job: Job) -> list[int]:
    """The earliest rows train, the latest test."""
    import numpy as np

    column = job.config.column
    if column is None:
        raise DataError(
            "data-split",
            "a split by time needs the column that holds it",
            where="preprocessing.split.column",
            received="no column",
            allowed=job.table.columns,
            fix="set preprocessing.split.column to the column with the dates, or split.type: random",
        )
    seconds, told = seconds_of(job.table.values(column), f"{job.table.name} column {column}")
    job.notes.extend(told)
    times = np.array(seconds)
    last, first = times.copy(), np.arange(len(times))
    for unit in job.units:
        last[unit] = times[unit].max()
        first[unit] = unit[0]
    order = np.lexsort((np.arange(len(times)), first, last))
    sizes = shares.sizes(len(times), job.shares, 0)
    sides = _sides(job)
    sides[order[sizes[0] : sizes[0] + sizes[1]]] = 1
    sides[order[sizes[0] + sizes[1] :]] = 2
    for unit in job.units:  # what belongs together goes where its first row went
        sides[unit] = sides[unit[0]]
    held_out = sides != 0
    if older := int((times[held_out] < times[~held_out].max(initial=-inf)).sum()):
        why = "rows of one group, and equal ones, stay together with their latest"
        job.notes.append(f"{older} rows outside train are older than the newest row in train: {why}")
    return _listed(sides)


@METHODS.register("hash")
def _hash(job: Job) -> list[int]:
    """By what the row says, so that it stays on its side when the table grows; a set by what its first row says."""
    column = job.config.group or job.config.column
    values = job.table.values(column) if column is not None else (None for _ in job.keys)
    sides = []
    for own, value in zip(job.keys, values, strict=True):
        key = str(own) if rowkeys.is_blank(value) else str(value)  # rows without a value do not belong together
        point = int.from_bytes(hashlib.sha256(f"{job.seed}\n{key}".encode()).digest()[:8], "big") / 2**64
        sides.append(0 if point < job.shares[0] else 1 if point < job.shares[0] + job.shares[1] else 2)
    for unit in job.units:
        for row in unit:
            sides[row] = sides[unit[0]]
    return sides


def _automatic(table: Table, split: SplitConfig, target: str | None) -> str:
    if SPLIT_COLUMN in table.columns:
        return "fixed"
    if target is None or target not in table.columns:
        return "random"
    seen: set[str] = set()
    answered = 0
    for value in table.values(target):
        if rowkeys.is_blank(value):
            continue
        answered += 1
        seen.add(rowkeys.text(value))
        if len(seen) > FEW_CLASSES:
            return "random"
    return "stratify" if len(seen) >= 2 and answered >= ROWS_PER_CLASS * len(seen) else "random"


def _across(groups: Groups, sides: Sequence[int]) -> int:
    """Rows outside train of sets that have a row in train."""
    held_out = ([sides[row] != 0 for row in unit] for unit in groups.sets()[0])
    return sum(sum(unit) for unit in held_out if not all(unit))


def _sides(job: Job) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.zeros(len(job.table), np.int8)


def _listed(sides: np.ndarray[Any, Any]) -> list[int]:
    return [int(side) for side in sides.tolist()]


def _draw(
    job: Job, units: list[list[int]], alone: np.ndarray[Any, Any], sides: np.ndarray[Any, Any], least: int
) -> None:
    """Put sets of rows, in random order and the large ones first, each on the side that lacks most; then the rest.

    With ``least``, the last and smallest sets go to sides that would have none.
    """
    import numpy as np

    empty = {side for side in range(3) if job.shares[side]}
    every = len(units) + len(alone) >= len(empty)
    lacking = shares.sizes(sum(map(len, units)) + len(alone), job.shares, least if every else 0)
    order = list(units)
    random.Random(f"split {job.seed}").shuffle(order)
    for place, unit in enumerate(sorted(order, key=len, reverse=True)):
        left = len(units) - place + len(alone)
        open_to = empty if every and least and left <= len(empty) else range(3)
        side = max(open_to, key=lambda s: (lacking[s], -s))
        lacking[side] -= len(unit)
        sides[unit] = side
        empty.discard(side)
    while min(lacking) < 0:  # a large set went beyond its side's share: the others give way
        lacking[lacking.index(min(lacking))] += 1
        lacking[lacking.index(max(lacking))] -= 1
    for side in empty if every and least else ():
        if not lacking[side]:
            lacking[lacking.index(max(lacking))] -= 1
            lacking[side] += 1
    seed = int.from_bytes(hashlib.sha256(f"split {job.seed}".encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(seed)).permutation(alone)
    sides[drawn[lacking[0] : lacking[0] + lacking[1]]] = 1
    sides[drawn[lacking[0] + lacking[1] :]] = 2
    sides[drawn[: lacking[0]]] = 0
