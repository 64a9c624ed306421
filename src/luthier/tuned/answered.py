"""The answers to the rows of a table: as records, as Ludwig's frame, scored, written to a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError
from luthier.metrics import DEFAULT_CLASS, DEFAULT_TEXT, available, score
from luthier.tuned.reading import Reader
from luthier.tuned.writing import FIELDS, answers_file, write_records
from luthier.types import Completion

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answered:
    """The answers to the rows of a table, in its order."""

    output: str  # the output feature's name
    rows: tuple[int, ...]  # indices in the table
    completions: tuple[Completion, ...]
    references: tuple[str | None, ...]
    reader: Reader | None = None  # of a category output
    # of a category: each class's, in the order of the classes; of text: each token's of the answer. None: not asked for
    probabilities: tuple[tuple[float, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The answers alone."""
        return [completion.text for completion in self.completions]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The allowed answers of a category output."""
        return self.reader.classes if self.reader is not None else None

    @property
    def predictions(self) -> list[str]:
        """The answers as they count: of a category output the class that each names, else the texts."""
        if self.reader is None:
            return self.texts
        known = self.probabilities or [None] * len(self)
        return [self.reader.read(text, chances or None) for text, chances in zip(self.texts, known, strict=True)]

    @property
    def probability(self) -> list[float | None]:
        """Of each row: the probability of the predicted class among the classes, or of the whole answer as text.

        None where it is not known: it was not asked for, the row failed, or its prediction is no class.
        """
        if self.probabilities is None:
            return [None] * len(self)
        if self.classes is None:
            return [math.prod(each) if each else None for each in self.probabilities]
        at = {name: i for i, name in enumerate(self.classes)}
        pairs = zip(self.predictions, self.probabilities, strict=True)
        return [each[at[name]] if each and name in at else None for name, each in pairs]

    def records(self) -> list[dict[str, Any]]:
        """One mapping a row: row, response, finish_reason, and the error of a row that could not be answered.

        A category output adds ``prediction``, and probabilities that were asked for ``probability``. Several answers
        add ``responses``, all of them; `generation.logprobs` adds ``logprobs`` and ``warped_logprobs``, a token each.
        """
        out = []
        each = zip(self.rows, self.completions, self.predictions, self.probability, strict=True)
        for row, done, prediction, chance in each:
            record: dict[str, Any] = {"row": row, "response": done.text, "finish_reason": done.finish_reason}
            if self.reader is not None:
                record["prediction"] = prediction
            if self.probabilities is not None:
                record["probability"] = chance
            if done.others:
                record["responses"] = [one.text for one in (done, *done.others)]
            if done.logprobs is not None:
                record |= {"logprobs": list(done.logprobs), "warped_logprobs": list(done.warped_logprobs or ())}
            out.append(record | ({"error": done.error} if done.error else {}))
        return out

    def scores(self) -> dict[str, float]:
        """Metrics against the table's own target column. Raises DataError when there is none."""
        known = [(t, r) for t, r in zip(self.predictions, self.references, strict=True) if r is not None]
        if not known:
            raise DataError("data-no-target", "no row holds a reference to score against", where=self.output)
        answers, references = zip(*known, strict=True)
        names = available(DEFAULT_CLASS if self.classes else DEFAULT_TEXT)  # those whose libraries are installed
        return score(list(answers), list(references), names, classes=self.classes)

    def ludwig_frame(self) -> pd.DataFrame:
        """Ludwig's columns: ``<output>_predictions``, ``_response`` (a list, of n strings) and ``_probability``.

        ``_probabilities`` holds a list a row: of each class for a category output, which also has one column
        ``_probabilities_<class>`` each; of each token of the answer for text.
        """
        import pandas as pd

        name = self.output
        columns: dict[str, list[Any]] = {
            f"{name}_predictions": self.predictions,
            f"{name}_response": [[one.text for one in (done, *done.others)] for done in self.completions],
            f"{name}_probability": self.probability,
        }
        if self.probabilities is not None:
            columns[f"{name}_probabilities"] = [list(each) for each in self.probabilities]
            for at, one in enumerate(self.classes or ()):
                columns[f"{name}_probabilities_{one}"] = [each[at] if each else None for each in self.probabilities]
        return pd.DataFrame(columns)

    def write(self, path: Path) -> str:
        """Write the records to `answers_file` of ``path``; returns its name. Raises DataError as that does."""
        path = answers_file(path)
        records = self.records()
        there = {name for record in records for name in record}
        write_records(path, records, [name for name in FIELDS if name in there or name in FIELDS[:3]])
        return str(path)
