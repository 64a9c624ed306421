"""What `LudwigModel` returns, in Ludwig's shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.metrics.confusion import confusion
from luthier.types import SPLITS

if TYPE_CHECKING:
    import pandas as pd

    from luthier.data.table import Table
    from luthier.tuned import Answered

Curves = dict[str, dict[str, list[float]]]  # output feature -> metric -> one value an evaluation
NOT_VALUES = ("time", "step", "epoch", "split")
COUNTS = ("supervised_tokens", "tokens", "tokens_computed", "passes", "rows", "skipped")  # of a step; added up


@dataclass
class TrainingStats:
    """``training[output][metric]`` holds one value an evaluation (an epoch, where there is none), likewise the others.

    A value of ``validation`` is of the weights at that evaluation, and with `trainer.evaluate_training_set` so is one
    of ``training``. Else one of ``training`` is of all steps since the evaluation before: the mean of loss (weighted by
    supervised tokens), gradient_norm and tokens_per_s, the sum of what is counted (tokens, rows, passes), and
    learning_rate and memory_gib as they are after the last of these steps.
    ``combined`` beside the output holds the loss. ``test`` holds one value, of the model that was kept: the test rows
    are not looked at while training, so that nothing is chosen by them.
    """

    training: Curves
    validation: Curves
    test: Curves

    @classmethod
    def of(
        cls, output: str, lines: Sequence[Mapping[str, Any]], tested: Mapping[str, float] | None = None
    ) -> TrainingStats:
        """The statistics in a run's metrics, ``lines`` as `luthier.run.read_metrics` gives them.

        ``tested``: the values of the test rows.
        """
        by_split: dict[str, list[Mapping[str, Any]]] = {}
        for line in lines:
            by_split.setdefault(line["split"], []).append(line)
        validation = by_split.get("validation", [])
        # rows that were evaluated as they are say more than the mean over an epoch in which the model changed
        training = by_split.get("train_evaluation") or _spans(by_split.get("train", []), validation)
        sides = (training, validation, [tested] if tested else [])
        return cls(*(_of_output(output, _curves(found)) for found in sides))


@dataclass
class PreprocessedData:
    """The rows that were trained on, validated and held out; unpacks as those three and the metadata."""

    table: Table | None
    sides: Sequence[int] | None  # 0, 1, 2 a row of the table
    training_set_metadata: dict[str, Any]  # ``examples``: how many of each split

    @property
    def training_set(self) -> pd.DataFrame | None:
        """The training rows as they were read; None when there are none."""
        return self._frame("train")

    @property
    def validation_set(self) -> pd.DataFrame | None:
        """The validation rows; None when there are none."""
        return self._frame("validation")

    @property
    def test_set(self) -> pd.DataFrame | None:
        """The test rows; None when there are none."""
        return self._frame("test")

    def __iter__(self) -> Iterator[Any]:
        return iter((self.training_set, self.validation_set, self.test_set, self.training_set_metadata))

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]

    def _frame(self, split: str) -> pd.DataFrame | None:
        wanted = list(SPLITS).index(split)  # type: ignore[arg-type]
        rows = [i for i, side in enumerate(self.sides or ()) if side == wanted]
        return frame_of(self.table, rows) if rows and self.table is not None else None


@dataclass
class TrainingResults:
    """What `LudwigModel.train` returns; unpacks as ``train_stats, preprocessed_data, output_directory``."""

    train_stats: TrainingStats
    preprocessed_data: PreprocessedData
    output_directory: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.train_stats, self.preprocessed_data, self.output_directory))

    def __getitem__(self, index: int) -> Any:
        return (self.train_stats, self.preprocessed_data, self.output_directory)[index]


def evaluation(answered: Answered, scores: Mapping[str, float], *, overall: bool) -> dict[str, dict[str, Any]]:
    """The statistics of an evaluation; ``overall``: with what is counted of a category's classes."""
    counted: dict[str, Any] = {}
    if overall and answered.classes:
        pairs = zip(answered.predictions, answered.references, strict=True)
        known = [(said, right) for said, right in pairs if right is not None]
        counted = confusion([said for said, _ in known], [right for _, right in known], answered.classes)
    return _of_output(answered.output, {**scores, **counted})


def _of_output(output: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the only output, and of all of them together: their loss is its own."""
    together = {"combined": {"loss": values["loss"]}} if "loss" in values else {}
    return {output: dict(values), **({} if output in together else together)} if values else {}


def frame_of(table: Table, rows: Sequence[int] | None = None) -> pd.DataFrame:
    """Rows of a table as a frame that holds the same values: text as text, nested values as they are."""
    import pandas as pd

    wanted = range(len(table)) if rows is None else rows
    return pd.DataFrame([table.row(i) for i in wanted], columns=table.columns, dtype=object)


def _spans(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One line for all steps since the evaluation before: see `TrainingStats`."""
    if not steps:
        return []
    ends = [line["step"] for line in evaluations] or [
        step["step"]
        for step, after in zip(steps, [*steps[1:], None], strict=True)
        if after is None or math.ceil(after["epoch"] - 1e-6) > math.ceil(step["epoch"] - 1e-6)
    ]
    counts = [name for name in COUNTS if any(name in line for line in steps)]
    out: list[Mapping[str, Any]] = []
    begin = 0
    for end in ends:
        span = [line for line in steps if begin < line["step"] <= end]
        begin = end
        if span:
            out.append(
                {**span[-1], **{name: sum(line.get(name, 0) for line in span) for name in counts}, **_means(span)}
            )
    return out


def _means(span: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is a mean over steps: the loss by supervised tokens, the gradient's norm by steps, the speed by time."""
    weights = [line.get("supervised_tokens") or 1 for line in span]
    means = {"loss": _mean([line["loss"] for line in span], weights)}
    if any("gradient_norm" in line for line in span):
        means["gradient_norm"] = _mean([line.get("gradient_norm") for line in span], [1] * len(span))
    timed = [(line["tokens"], line["tokens_per_s"]) for line in span if line.get("tokens") and line.get("tokens_per_s")]
    if timed:
        means["tokens_per_s"] = sum(tokens for tokens, _ in timed) / sum(tokens / speed for tokens, speed in timed)
    return means


def _mean(values: Sequence[float | None], weights: Sequence[float]) -> float:
    """The weighted mean of those that are finite; NaN where none is."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Name → a value a line, NaN where it was not finite, so that the values of all names stand beside one another."""
    curves: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_VALUES and (value is None or isinstance(value, (int, float))):
                curves.setdefault(name, []).append(math.nan if value is None else value)
    return curves
