"""Everything that `fit` needs, in one frozen object, and what it gives back. The pipeline makes the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from luthier.events import Sink, silent
from luthier.objectives.terms import Objective
from luthier.plan.recorded import leaner
from luthier.train.comm import Comm, OneRank
from luthier.train.precision import Precision
from luthier.types import Batch, Example, Plan, StepSource

if TYPE_CHECKING:
    import torch

    from luthier.config.trainer import Trainer

Passes = Sequence[Sequence[Example]]
T = TypeVar("T")


class Runner(Protocol):
    """Calls ``run`` with the examples in passes and the plan that cut them; gives what it returned."""

    def __call__(self, examples: Sequence[Example], run: Callable[[Passes, Plan], T], /) -> T:
        """``run`` may be called again, with other passes, after it ran out of memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, on what, how long, and who is told.

    model: on ``plan.device``; its parameters with requires_grad are what is trained, saved and restored.
    logprobs: Batch → [n] log-probabilities of the supervised targets, in the order of target_weight's nonzeros.
    source: yields effective batches; its ``steps_per_epoch`` and the totals below are in optimizer steps.
    total_steps: optimizer steps of the whole run; left out, ``trainer.train_steps`` or ``trainer.epochs`` decide.
    learning_rate: the peak; left out, ``trainer.optimizer.lr`` or ``trainer.learning_rate``.
    evaluate: called between steps with what runs examples in passes of the plan in force; returns at least ``loss``
        (see `luthier.train.evaluation.Evaluator`).
    checkpoints: the folder of the checkpoints; a run there is continued from its newest whole one.
    evaluate_train: the same over training rows (``trainer.evaluate_training_set``).
    save_adapter: called once at the end, with the best weights in place; returns what it wrote.
    leaner: given the plan that ran out of memory and the longest row of the step, the plan to go on with; None when
        there is none.
    more_room: keys of `execution` that a run can go on with where there is none, for the message.
    adopt: puts another plan into effect in the model, from the next pass on.
    penalty: a term of the weights alone that every step adds once (AdaLoRA's orthogonality), or None.
    after_update: called with the number of each update (from 1) while its gradients are there (for AdaLoRA).
    model_state, restore_model: what the model keeps beside its weights, for checkpoints.
    start: weights that a new run begins with, by name, instead of the model's own.
    resume_hint: the command that continues the run, for the message of an interruption.
    """

    model: torch.nn.Module
    logprobs: Callable[[Batch], torch.Tensor]
    objective: Objective
    source: StepSource
    plan: Plan
    trainer: Trainer
    checkpoints: Path
    learning_rate: float | None = None
    total_steps: int | None = None
    evaluate: Callable[[Runner], Mapping[str, float]] | None = None
    evaluate_train: Callable[[Runner], Mapping[str, float]] | None = None
    save_adapter: Callable[[], Path] | None = None
    penalty: Callable[[], torch.Tensor | None] | None = None
    after_update: Callable[[int], None] | None = None
    model_state: Callable[[], Mapping[str, Any]] | None = None
    restore_model: Callable[[Mapping[str, Any]], None] | None = None
    precision: Precision = "fp32"
    seed: int = 42
    sink: Sink = silent
    comm: Comm = field(default_factory=OneRank)
    loraplus_lr_ratio: float | None = None
    leaner: Callable[[Plan, int], Plan | None] = leaner
    more_room: Callable[[Plan], Sequence[str]] = lambda plan: ()
    adopt: Callable[[Plan], None] = lambda plan: None
    start: Callable[[], Mapping[str, torch.Tensor]] | None = None
    resume_hint: str = "run the same command again with the same --output folder"

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or self.trainer.optimizer.lr or self.trainer.learning_rate

    @property
    def steps_per_evaluation(self) -> int:
        """Optimizer steps between evaluations: declared, else an epoch."""
        return self.trainer.steps_per_evaluation or self.source.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        declared = self.total_steps or self.trainer.train_steps
        return declared or self.trainer.epochs * self.source.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended. ``evaluations``: one mapping each, with ``step``, ``epoch`` and the values of evaluate.

    best_step and best_value are None without validation rows; ``stopped`` is "finished" or "early".
    """

    steps: int
    epochs: float
    stopped: str
    metric: str
    best_step: int | None
    best_value: float | None
    evaluations: tuple[Mapping[str, float], ...]
    train_loss: float | None  # of the last step
    resumed_from: int | None
    seconds: float
    memory_gib: float
    saved: Path | None

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON types."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return out | {
            "saved": None if self.saved is None else str(self.saved),
            "evaluations": [dict(one) for one in self.evaluations],
        }
