"""Which rows train, validate and test: as the table says, or drawn, with what belongs together on one side."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.data.duplicates import Groups, near_pairs, normalised
from luthier.data.sources.splits import SPLIT_COLUMN, number
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.registry import Registry
from luthier.types import SPLITS, Split

ALLOWED = "0 or train, 1 or validation, 2 or test"
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

    def of(self, split: Split) -> list[int]:
        """The row numbers of one side, in order."""
        wanted = SPLITS.index(split)
        return [i for i, side in enumerate(self.rows) if side == wanted]


@dataclass(frozen=True, slots=True)
class Job:
    """What a way of splitting works with. ``units`` are the sets of rows that stay together."""

    table: Table
    config: SplitConfig
    units: list[list[int]]
    keys: list[str]  # each row's normalised text
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
) -> SplitResult:
    """Put each row on a side.

    ``target`` is the column that is learned (its classes are what `stratify` balances); ``columns`` are those that
    make two rows the same question (None: all but the target). Raises DataError ``data-split`` when no row would
    train or a given side is unknown, ``data-missing-column`` for a column that is not there.
    """
    kind = split.type
    if kind == "auto":
        kind = _automatic(table, split, target)
    notes: list[str] = []
    if kind != "fixed" and SPLIT_COLUMN in table.columns:
        notes.append(f"the column {SPLIT_COLUMN!r} is not used, because preprocessing.split.type is {kind}")
    keys = _keys(table, target, columns, split)
    groups = Groups(len(table))
    groups.join_equal([key or None for key in keys])
    duplicates = len(table) - len(groups.sets())
    if near_duplicates and kind in ("random", "stratify"):
        pairs, alike = near_pairs(keys)
        for one, other in pairs:
            groups.join(one, other)
        if alike:
            notes.append(f"{alike} rows are nearly alike; taken as a common form, not as duplicates of each other")
    if split.group is not None:
        groups.join_equal([_hashable(v) for v in table.column(split.group)])
    own_seed = seed if split.seed is None else split.seed
    job = Job(table, split, groups.sets(), keys, _shares(split.probabilities), own_seed, target, notes)
    sides = METHODS.get(kind, "preprocessing.split.type")(job)
    counts: dict[Split, int] = {name: sides.count(i) for i, name in enumerate(SPLITS)}
    if not counts["train"]:
        raise DataError(
            "data-split",
            f"no row of {table.name} is left to train on",
            where=table.name,
            received=", ".join(f"{name} {n}" for name, n in counts.items()),
            fix="give more rows, a larger first share in preprocessing.split.probabilities, or mark rows as train",
        )
    leaked = _leaked(sides, keys)
    if leaked:
        notes.append(f"{leaked} rows outside train repeat a row in train; scores on them flatter the model")
    return SplitResult(sides, kind, counts, tuple(notes), duplicates, leaked)


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
    return _draw(job, job.units, len(job.table), least=1 if len(job.table) >= 10 else 0)


@METHODS.register("stratify")
def _stratify(job: Job) -> list[int]:
    column = job.config.column or job.target
    if column is None:
        raise DataError(
            "data-split",
            "a stratified split needs a column with classes",
            where="preprocessing.split.column",
            allowed=job.table.columns,
        )
    labels = [_hashable(value) for value in job.table.column(column)]
    strata: dict[Hashable, list[list[int]]] = {}
    for unit in job.units:
        strata.setdefault(Counter(labels[row] for row in unit).most_common(1)[0][0], []).append(unit)
    sides = [0] * len(job.table)
    wanted = sum(1 for share in job.shares if share)
    for label in sorted(strata, key=str):
        units = strata[label]
        if len(units) < wanted:
            job.notes.append(f"the class {label!r} has {len(units)} separate rows, too few for every split")
        part = _draw(job, units, sum(map(len, units)), least=1)
        for unit in units:
            for row in unit:
                sides[row] = part[row]
    return sides


@METHODS.register("datetime")
def _datetime(job: Job) -> list[int]:
    """The earliest rows train, the latest test."""
    column = job.config.column
    if column is None:
        raise DataError(
            "data-split",
            "a split by time needs the column that holds it",
            where="preprocessing.split.column",
            allowed=job.table.columns,
        )
    times = [_time(v, f"{job.table.name} row {i} column {column}") for i, v in enumerate(job.table.column(column))]
    groups = {row: k for k, unit in enumerate(job.units) for row in unit}
    last = {k: max(times[row] for row in unit) for k, unit in enumerate(job.units)}
    order = sorted(range(len(times)), key=lambda row: (last[groups[row]], groups[row], row))
    sizes = _sizes(len(times), job.shares, 0)
    sides = [0] * len(times)
    for rank, row in enumerate(order):
        sides[row] = 0 if rank < sizes[0] else 1 if rank < sizes[0] + sizes[1] else 2
    for unit in job.units:  # what belongs together goes where its first row went
        for row in unit:
            sides[row] = sides[unit[0]]
    return sides


@METHODS.register("hash")
def _hash(job: Job) -> list[int]:
    """By what the row says, so that it stays on its side when the table grows."""
    column = job.config.group or job.config.column
    keys = job.keys if column is None else [str(v) for v in job.table.column(column)]
    sides = []
    for key in keys:
        point = int.from_bytes(hashlib.sha256(f"{job.seed}\n{key}".encode()).digest()[:8], "big") / 2**64
        sides.append(0 if point < job.shares[0] else 1 if point < job.shares[0] + job.shares[1] else 2)
    return sides


def _automatic(table: Table, split: SplitConfig, target: str | None) -> str:
    if SPLIT_COLUMN in table.columns:
        return "fixed"
    if target is None or target not in table.columns:
        return "random"
    values = [_hashable(v) for v in table.column(target) if v is not None]
    distinct = len(set(values))
    few = 2 <= distinct <= FEW_CLASSES and len(values) >= ROWS_PER_CLASS * distinct
    return "stratify" if few else "random"


def _draw(job: Job, units: list[list[int]], total: int, least: int) -> list[int]:
    """Units in random order, the large ones first, each to the side that lacks most. Rows of others stay 0."""
    order = list(units)
    random.Random(f"split {job.seed}").shuffle(order)
    order.sort(key=len, reverse=True)
    lacking = _sizes(total, job.shares, least if len(units) >= sum(1 for s in job.shares if s) else 0)
    sides = [0] * len(job.table)
    for unit in order:
        side = max(range(3), key=lambda s: (lacking[s], -s))
        lacking[side] -= len(unit)
        for row in unit:
            sides[row] = side
    return sides


def _sizes(total: int, shares: Sequence[float], least: int) -> list[int]:
    """``total`` divided by ``shares``, largest remainders rounded up; at least ``least`` where the share is not 0."""
    exact = [total * share for share in shares]
    sizes = [int(x + 1e-9) for x in exact]
    for side in sorted(range(3), key=lambda s: sizes[s] - exact[s])[: total - sum(sizes)]:
        sizes[side] += 1
    for side in range(3):
        while shares[side] and sizes[side] < least and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[side] += 1
    return sizes


def _shares(probabilities: Sequence[float]) -> tuple[float, float, float]:
    """Three shares that sum to 1."""
    given = [float(p) for p in probabilities]
    if len(given) != 3 or any(p < 0 for p in given) or not 0.999 <= sum(given) <= 1.001:
        raise DataError(
            "data-split",
            "the shares of train, validation and test do not sum to 1",
            where="preprocessing.split.probabilities",
            received=str(given),
            allowed="three numbers from 0 to 1 that sum to 1",
        )
    total = sum(given)
    return given[0] / total, given[1] / total, given[2] / total


def _keys(table: Table, target: str | None, columns: Sequence[str] | None, split: SplitConfig) -> list[str]:
    """Each row's normalised text over the columns that make it what it is."""
    apart = {SPLIT_COLUMN, split.group, split.column}
    usable = [c for c in table.columns if c not in apart] or table.columns
    chosen = [c for c in columns if c in table.columns] if columns else [c for c in usable if c != target]
    keys = _texts(table, chosen)
    if not columns and len(set(keys)) < 0.5 * len(table):  # such as a source beside a conversation: look at all
        keys = _texts(table, usable)
    return keys


def _texts(table: Table, columns: Sequence[str]) -> list[str]:
    parts = [[_text(value) for value in table.column(column)] for column in columns]
    return [normalised("\n".join(values)) for values in zip(*parts, strict=True)] if parts else [""] * len(table)


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _hashable(value: Any) -> Hashable:
    return None if value is None else _text(value)


def _leaked(sides: Sequence[int], keys: Sequence[str]) -> int:
    trained = {key for key, side in zip(keys, sides, strict=True) if side == 0 and key}
    return sum(1 for key, side in zip(keys, sides, strict=True) if side and key in trained)


def _time(value: Any, where: str) -> float:
    """Seconds since the epoch of a date, a number, or ISO 8601 text; a time without zone counts as UTC."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value.strip().replace("/", "-"))
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                value = None
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC).timestamp()
    if isinstance(value, (int, float)):
        return float(value)
    raise DataError(
        "data-split",
        "a value is not a date or time",
        where=where,
        received=value,
        allowed="a date such as 2024-05-31 or 2024-05-31T12:00:00, or a number",
        fix="mend the value, or split in another way",
    )
