"""The answers to the rows of a table: as records, as Ludwig's frame, scored, written to a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError
from luthier.metrics import DEFAULT_CLASS, DEFAULT_TEXT, available, normal_class, score
from luthier.metrics.calibration import BINS, calibration_error, softmax
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
    # Log-probabilities of each class (category, in the order of the classes) or of each token of the answer (text);
    # () of a row that failed. None: not asked for.
    log_probabilities: tuple[tuple[float, ...], ...] | None = None
    temperature: float = 1.0  # of the classes

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
    def probabilities(self) -> tuple[tuple[float, ...], ...] | None:
        """Of each row: the classes' probabilities, which sum to 1, or those of the answer's tokens; () if it failed."""
        if self.log_probabilities is None:
            return None
        if self.reader is None:
            return tuple(tuple(map(math.exp, row)) for row in self.log_probabilities)
        return tuple(tuple(softmax(row, self.temperature)) if row else () for row in self.log_probabilities)

    @property
    def predictions(self) -> list[str]:
        """The answers as they count: of a category output the class that each names, else the texts.

        "" for a row that could not be asked: what nobody answered is no class, not the fallback's either.
        """
        if self.reader is None:
            return self.texts
        known = self.log_probabilities or [None] * len(self)
        pairs = zip(self.completions, known, strict=True)
        return ["" if done.error else self.reader.read(done.text, chances or None) for done, chances in pairs]

    @property
    def unasked(self) -> str:
        """How many rows could not be asked, and why the first could not; "" where all were."""
        failed = [(row, done.error) for row, done in zip(self.rows, self.completions, strict=True) if done.error]
        if not failed:
            return ""
        row, why = failed[0]
        return f"{len(failed)} of {len(self)} rows could not be asked and have no answer; row {row}: {why}"

    @property
    def probability(self) -> list[float | None]:
        """Of each row: the probability of the predicted class among the classes, or of the whole answer as text.

        None where it is not known: it was not asked for, the row failed, or its prediction is no class.
        """
        known = self.probabilities
        if known is None:
            return [None] * len(self)
        if self.classes is None:
            return [math.prod(each) if each else None for each in known]
        at = {name: i for i, name in enumerate(self.classes)}
        pairs = zip(self.predictions, known, strict=True)
        return [each[at[name]] if each and name in at else None for name, each in pairs]

    def labelled(self) -> tuple[list[tuple[float, ...]], list[int]]:
        """The classes' log-probabilities of the rows whose class is known, and that class's place."""
        at = {name: i for i, name in enumerate(self.classes or ())}
        pairs = zip(self.log_probabilities or (), self.references, strict=True) if self.log_probabilities else ()
        named = ((row, normal_class(right or "", self.classes or ())) for row, right in pairs if row)
        kept = [(row, at[name]) for row, name in named if name in at]
        return [row for row, _ in kept], [label for _, label in kept]

    def calibration(self) -> dict[str, float] | None:
        """The expected calibration error of a category's probabilities, with and without their temperature.

        None where no row has both probabilities and a known class.
        """
        scores, labels = self.labelled()
        if not labels:
            return None
        return {
            "error": calibration_error(scores, labels, self.temperature),
            "error_before": calibration_error(scores, labels),
            "temperature": self.temperature,
            "rows": len(labels),
            "bins": BINS,
        }

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
            if self.log_probabilities is not None:
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
            raise DataError(
                "data-no-target",
                "no row holds a reference to score against",
                where=self.output,
                received=f"{len(self.predictions)} rows without a reference",
                allowed=f"rows with an answer in the column {self.output!r}",
                fix=f"fill the column {self.output!r}, or ask for predictions alone",
            )
        answers, references = zip(*known, strict=True)
        names = available(DEFAULT_CLASS if self.classes else DEFAULT_TEXT)  # those whose libraries are installed
        return score(list(answers), list(references), names, classes=self.classes)

    def ludwig_frame(self) -> pd.DataFrame:
        """Ludwig's columns: ``<output>_predictions``, ``_response`` (a list, of n strings) and ``_probability``.

        ``_probabilities`` holds a list a row: of each class for a category output, which also has one column
        ``_probabilities_<class>`` each; of each token of the answer for text. Where a row could not be asked,
        ``_error`` says why; None for the others.
        """
        import pandas as pd

        name = self.output
        columns: dict[str, list[Any]] = {
            f"{name}_predictions": self.predictions,
            f"{name}_response": [[one.text for one in (done, *done.others)] for done in self.completions],
            f"{name}_probability": self.probability,
        }
        known = self.probabilities
        if known is not None:
            columns[f"{name}_probabilities"] = [list(each) for each in known]
            for at, one in enumerate(self.classes or ()):
                columns[f"{name}_probabilities_{one}"] = [each[at] if each else None for each in known]
        if self.unasked:
            columns[f"{name}_error"] = [done.error or None for done in self.completions]
        return pd.DataFrame(columns)

    def write(self, path: Path) -> str:
        """Write the records to `answers_file` of ``path``; returns its name. Raises DataError as that does."""
        path = answers_file(path)
        records = self.records()
        there = {name for record in records for name in record}
        write_records(path, records, [name for name in FIELDS if name in there or name in FIELDS[:3]])
        return str(path)
