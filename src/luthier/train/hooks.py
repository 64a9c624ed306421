"""Hooks: each holds a state that resumes and returns decisions. The loop alone carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.config.trainer import Trainer

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "train/loss", "train/perplexity"})


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall happen next. Decisions of several hooks add up."""

    evaluate: bool = False
    save: bool = False
    stop: str | None = None
    scale_rate: float = 1.0
    warn: str | None = None
    rewind: str | None = None  # why an earlier checkpoint shall be put back

    def __add__(self, other: Decision) -> Decision:
        return Decision(
            self.evaluate or other.evaluate,
            self.save or other.save,
            self.stop or other.stop,
            self.scale_rate * other.scale_rate,
            self.warn or other.warn,
            self.rewind or other.rewind,
        )


NOTHING = Decision()


class Hook(Protocol):
    """Told of each step and evaluation; asked what shall follow."""

    def after_step(self, step: int, loss: float) -> Decision:
        """``step`` optimizer steps are finished, the last with this loss."""
        ...

    def after_evaluation(self, step: int, values: Mapping[str, float]) -> Decision:
        """An evaluation after ``step`` steps gave these values."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON types."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...


class Rhythm:
    """Evaluate every ``per_evaluation`` steps, save every N steps or so many times an epoch, do both at the end."""

    def __init__(self, trainer: Trainer, per_epoch: int, per_evaluation: int, total: int) -> None:
        self.every = trainer.steps_per_checkpoint
        self.marks = trainer.checkpoints_per_epoch or 1
        self.per_epoch, self.per_evaluation, self.total = per_epoch, per_evaluation, total

    def after_step(self, step: int, loss: float) -> Decision:
        """Whether a mark was reached by this step."""
        if self.every:
            save = step % self.every == 0
        else:  # whole numbers, so that the marks of an epoch never drift
            save = step * self.marks // self.per_epoch > (step - 1) * self.marks // self.per_epoch
        last = step >= self.total
        return Decision(evaluate=last or step % self.per_evaluation == 0, save=last or save)

    def after_evaluation(self, step: int, values: Mapping[str, float]) -> Decision:
        """Nothing."""
        return NOTHING

    def state(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class Best:
    """Remembers the best evaluation, and all of them; ends the run after ``patience`` in a row without improvement.

    With a patience of 0 or -1 it never does.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0
        self.history: list[dict[str, float]] = []

    def after_step(self, step: int, loss: float) -> Decision:
        """Nothing."""
        return NOTHING

    def after_evaluation(self, step: int, values: Mapping[str, float]) -> Decision:
        """Raises ConfigError when the metric that decides is not among the values."""
        self.history.append({"step": step, **values})
        if better(self.metric, measured(self.metric, values), self.value):
            self.step, self.value, self.waited = step, values[self.metric], 0
            return Decision(save=True)
        self.waited += 1
        if 0 < self.patience <= self.waited:
            return Decision(stop=f"no better {self.metric} in {self.waited} evaluations")
        return NOTHING

    def state(self) -> dict[str, Any]:
        """The best so far, the evaluations waited, and all values."""
        return {"step": self.step, "value": self.value, "waited": self.waited, "history": self.history}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
        self.history = [dict(one) for one in state["history"]]


class Plateau:
    """Reduces the learning rate when validation stops improving, as often as declared."""

    def __init__(self, metric: str, times: int, patience: int, rate: float) -> None:
        self.metric, self.times, self.patience, self.rate = metric, times, patience, rate
        self.value: float | None = None
        self.waited = self.used = 0

    def after_step(self, step: int, loss: float) -> Decision:
        """Nothing."""
        return NOTHING

    def after_evaluation(self, step: int, values: Mapping[str, float]) -> Decision:
        """A factor of the learning rate once patience is over."""
        if self.used >= self.times:
            return NOTHING
        if better(self.metric, measured(self.metric, values), self.value):
            self.value, self.waited = values[self.metric], 0
            return NOTHING
        self.waited += 1
        if self.waited < self.patience:
            return NOTHING
        self.waited, self.used = 0, self.used + 1
        return Decision(scale_rate=self.rate)

    def state(self) -> dict[str, Any]:
        """The best value, the evaluations waited, the reductions made."""
        return {"value": self.value, "waited": self.waited, "used": self.used}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.value, self.waited, self.used = state["value"], state["waited"], state["used"]


def measured(metric: str, values: Mapping[str, float]) -> float:
    """The value of the metric that decides. Raises ConfigError config-bad-value when evaluation has no such value."""
    if metric in values:
        return values[metric]
    raise ConfigError(
        "config-bad-value",
        f"evaluation does not give {metric!r}",
        where="trainer.validation_metric",
        received=metric,
        allowed=sorted(values),
        fix="validation_metric: loss",
    )


def better(metric: str, value: float, than: float | None) -> bool:
    """Whether a value is an improvement; one that is not a number never is."""
    if value != value:
        return False
    return than is None or (value < than if metric in LOWER_IS_BETTER else value > than)
