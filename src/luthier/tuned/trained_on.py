"""The table that a run was trained on, where that is still at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.data.table import Table
from luthier.errors import RunError


@dataclass(frozen=True)
class TrainedOn:
    """The table, and 0, 1 or 2 (training, validation, test) for each of its rows; or ``why`` there is none."""

    table: Table | None = None
    splits: Sequence[int] | None = None
    why: str = "it was not trained"

    def required(self, folder: Path | None, *, given: bool) -> tuple[Table, Sequence[int]]:
        """Table and splits. Raises RunError run-no-table when there are none; ``given``: other rows were named."""
        if self.table is not None and self.splits is not None:
            return self.table, self.splits
        without = "leave the base with examples out: --shots 0 (in Python: shots=0)"
        raise RunError(
            "run-no-table",
            "the examples for the base come from the table of the training, which is not at hand"
            if given
            else "the held-out rows are in the table of the training, which is not at hand",
            where=str(folder) if folder is not None else "the model",
            received=self.why,
            fix=without if given else f"name rows with answers: --dataset FILE (dataset=…), and {without}",
        )
