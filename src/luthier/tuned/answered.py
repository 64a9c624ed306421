"""The answers to the rows of a table: as records, as Ludwig's frame, scored, written to a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError
from luthier.metrics import DEFAULT_CLASS, DEFAULT_TEXT, available, score
from luthier.run import atomic
from luthier.types import Completion

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Answered:
    """The answers to the rows of a table, in its order."""

    output: str  # the output feature's name
    rows: tuple[int, ...]  # indices in the table
    completions: tuple[Completion, ...]
    references: tuple[str | None, ...]
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The answers alone."""
        return [completion.text for completion in self.completions]

    def records(self) -> list[dict[str, Any]]:
        """One mapping a row: row, response, finish_reason, and the error of a row that could not be answered."""
        out = []
        for row, done in zip(self.rows, self.completions, strict=True):
            record: dict[str, Any] = {"row": row, "response": done.text, "finish_reason": done.finish_reason}
            out.append(record | ({"error": done.error} if done.error else {}))
        return out

    def scores(self) -> dict[str, float]:
        """Metrics against the table's own target column. Raises DataError when there is none."""
        known = [(t, r) for t, r in zip(self.texts, self.references, strict=True) if r is not None]
        if not known:
            raise DataError("data-no-target", "no row holds a reference to score against", where=self.output)
        answers, references = zip(*known, strict=True)
        names = available(DEFAULT_CLASS if self.classes else DEFAULT_TEXT)  # those whose libraries are installed
        return score(list(answers), list(references), names, classes=self.classes)

    def ludwig_frame(self) -> pd.DataFrame:
        """Ludwig's columns: ``<output>_predictions``, ``_response`` (a list of one string) and ``_probability``."""
        import math

        import pandas as pd

        def probability(done: Completion) -> float | None:
            return math.exp(sum(done.logprobs)) if done.logprobs else None

        name = self.output
        return pd.DataFrame(
            {
                f"{name}_predictions": self.texts,
                f"{name}_response": [[text] for text in self.texts],
                f"{name}_probability": [probability(done) for done in self.completions],
            }
        )

    def write(self, path: Path) -> str:
        """Write the records to `answers_file` of ``path``; returns its name. Raises DataError as that does."""
        import pandas as pd

        path = answers_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = self.records()
        if path.suffix == ".csv":
            pd.DataFrame(records).to_csv(path, index=False)
        elif path.suffix == ".parquet":
            pd.DataFrame(records).to_parquet(path, index=False)
        else:
            atomic.write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        return str(path)


def answers_file(path: Path) -> Path:
    """The file for the answers, by its ending; a folder, or a name without an ending, gets a predictions.csv.

    Raises DataError for another ending, so that it can be asked before the work is done.
    """
    if path.is_dir() or not path.suffix:
        return path / "predictions.csv"
    if path.suffix not in FORMATS:
        raise DataError(
            "data-unreadable",
            "answers cannot be written in this format",
            where=str(path),
            received=path.suffix,
            allowed=FORMATS,
            fix=f"name it {path.with_suffix('.csv').name}",
        )
    return path
