"""The table that a run was trained on, where that is still at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.data.table import Table
from luthier.errors import RunError

Use = Literal["predict", "evaluate", "show"]

_WITHOUT = "leave the base with examples out: --shots 0 (in Python: shots=0)"
# What is missing for a use, and what to do without it.
_WANTING: dict[Use, tuple[str, str]] = {
    "predict": ("rows that predict answers where none are named", "name the rows to answer: dataset=…"),
    "evaluate": ("held-out rows", f"name rows with answers: --dataset FILE (dataset=…), and {_WITHOUT}"),
    "show": ("examples for the base", _WITHOUT),
}


@dataclass(frozen=True)
class TrainedOn:
    """The table, and 0, 1 or 2 (training, validation, test) for each of its rows; or ``why`` there is none."""

    table: Table | None = None
    splits: Sequence[int] | None = None
    why: str = "it was not trained"

    def required(self, folder: Path | None, use: Use) -> tuple[Table, Sequence[int]]:
        """Table and splits, for this ``use``. Raises RunError run-no-table when there are none."""
        if self.table is not None and self.splits is not None:
            return self.table, self.splits
        what, fix = _WANTING[use]
        raise RunError(
            "run-no-table",
            f"the {what} come from the table of the training, which is not at hand",
            where=str(folder) if folder is not None else "the model",
            received=self.why,
            fix=fix,
        )
