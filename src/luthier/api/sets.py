"""Ludwig's training_set, validation_set and test_set: one table, whose rows stay in the set they were given as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.config import Config
from luthier.data.sources import Limits, read
from luthier.data.sources.splits import SPLIT_COLUMN, number
from luthier.data.table import Table, stacked
from luthier.errors import ConfigError, DataError

if TYPE_CHECKING:
    from luthier.api.model import Dataset

NAMES = ("training_set", "validation_set", "test_set")


def named(*sets: Dataset) -> dict[str, Dataset]:
    """The sets that are given, by the names of their arguments."""
    return {name: one for name, one in zip(NAMES, sets, strict=True) if one is not None}


def check_alone(dataset: Dataset, sets: Mapping[str, Dataset]) -> None:
    """Raise ConfigError for sets beside a dataset, and for sets to hold out without one to train on."""
    if not sets or (dataset is None and NAMES[0] in sets):
        return
    given = [*(["dataset"] if dataset is not None else []), *sets]
    if NAMES[0] in sets:
        said, fix = "dataset and training_set are both given", "give dataset, or training_set with the others"
    else:
        said, fix = f"{' and '.join(sets)} without training_set", f"give training_set beside {' and '.join(sets)}"
    raise ConfigError(
        "config-conflict",
        said,
        where="LudwigModel.train",
        received=" and ".join(given),
        allowed="dataset alone, or training_set with validation_set and test_set",
        fix=f"{fix}; a table with a column `split` (train, validation, test) can be the dataset",
    )


def unused_split(declared: Config) -> str | None:
    """What is told of a split that the config names and the sets take the place of."""
    split = declared.preprocessing.split
    usual = type(split)()  # a config that was read again names every key
    given = {str(path[2]) for path in declared._given if path[:2] == ("preprocessing", "split") and len(path) > 2}
    unused = sorted(name for name in given - {"group"} if getattr(split, name) != getattr(usual, name))
    if not unused or (set(unused) <= {"type", "column"} and _is_ours(split)):
        return None
    return f"preprocessing.split ({', '.join(unused)}) is not used: the sets that are given are the split"


def fixed(settings: Config) -> Config:
    """``settings`` for `joined`, whose column says which row is of which set."""
    split = settings.preprocessing.split
    if _is_ours(split):
        return settings
    split = split.model_copy(update={"type": "fixed", "column": None})
    preprocessing = settings.preprocessing.model_copy(update={"split": split})
    return settings.model_copy(update={"preprocessing": preprocessing})


def _is_ours(split: Any) -> bool:
    """Whether this is what reads the column `split` already."""
    return split.type in ("auto", "fixed") and split.column in (None, SPLIT_COLUMN)


def joined(sets: Mapping[str, Dataset], settings: Config) -> Table:
    """The sets as one table with the column `split`, each read as the config wants a dataset read."""
    given = settings.preprocessing
    limits = Limits(**given.limits.model_dump())
    tables, notes = [], []
    for name, one in sets.items():
        table = read(one, encoding=given.encoding, sheet=given.sheet, limits=limits)
        notes += [f"{name}: {note}" for note in table.notes]
        tables.append(_marked(table, name))
    return stacked(tables, " + ".join(f"{name} {table.name}" for name, table in zip(sets, tables, strict=True)), notes)


def _marked(table: Table, name: str) -> Table:
    """The table with its set's number in the column `split`. Raises DataError where it has one that says otherwise."""
    import pyarrow as pa

    side = NAMES.index(name)
    rows = table.rows
    if SPLIT_COLUMN in table.columns:
        for at, value in enumerate(table.values(SPLIT_COLUMN)):
            if number(value) != side:
                raise DataError(
                    "data-split",
                    f"the column {SPLIT_COLUMN!r} of {name} says another set than the one it is given as",
                    where=f"{name} ({table.name}) row {at} column {SPLIT_COLUMN}",
                    received="nothing" if value is None else value,
                    allowed=f"{side} in every row, or no such column",
                    fix="drop or rename the column, or give one table with it as dataset",
                )
        rows = rows.drop_columns([SPLIT_COLUMN])
    marked = rows.append_column(SPLIT_COLUMN, pa.array([side] * len(table), pa.int64()))
    return Table(marked, table.name)
