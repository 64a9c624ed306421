"""The learning rate as a function of the optimizer step; never of the micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from luthier.registry import Registry

if TYPE_CHECKING:
    from luthier.config.schedule import Schedule

# (steps since the warm-up, steps from it to the end, section, floor as a share of the peak) → factor
Decay = Callable[[int, int, "Schedule", float], float]
DECAYS: Registry[Decay] = Registry("learning rate decay")


def warmup_steps(section: Schedule, total: int, per_evaluation: int) -> int:
    """Optimizer steps of the warm-up, at most all of them."""
    return min(total, _declared(section, total, per_evaluation))


def cut_warmup(section: Schedule, total: int, per_evaluation: int) -> str | None:
    """What is told of a warm-up that is longer than the run."""
    declared = _declared(section, total, per_evaluation)
    if declared <= total:
        return None
    said = f"warmup_steps: {declared}"
    if section.warmup_steps is None:
        said = f"warmup_evaluations: {section.warmup_evaluations:g} ({declared} steps)"
    return (
        f"trainer.learning_rate_scheduler.{said} is longer than the run: the warm-up is cut to {total} "
        f"step{'' if total == 1 else 's'}, so the rate rises to the end"
    )


def _declared(section: Schedule, total: int, per_evaluation: int) -> int:
    """The warm-up as given: in steps, in evaluations, or as a fraction of all steps, rounded up."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    if section.warmup_evaluations:
        return math.ceil(section.warmup_evaluations * per_evaluation)
    return math.ceil(section.warmup_fraction * total - 1e-9)  # 0.03 * 100 is a little over 3


def factor(section: Schedule, step: int, total: int, per_evaluation: int, peak: float) -> float:
    """What to multiply the peak learning rate by in optimizer step ``step`` (from 0) of ``total``.

    The warm-up rises linearly and reaches 1 in its last step, so no step is spent at 0.
    """
    warm = warmup_steps(section, total, per_evaluation)
    if step < warm:
        return (step + 1) / warm
    decay = DECAYS.get(section.decay or "constant", where="trainer.learning_rate_scheduler.decay")
    return decay(step - warm, max(1, total - warm), section, min(1.0, section.eta_min / peak))


@DECAYS.register("constant")
def _constant(step: int, span: int, section: Schedule, floor: float) -> float:
    return 1.0


@DECAYS.register("linear")
def _linear(step: int, span: int, section: Schedule, floor: float) -> float:
    return floor + (1 - floor) * max(0.0, 1 - step / span)


@DECAYS.register("cosine")
def _cosine(step: int, span: int, section: Schedule, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / span)))


@DECAYS.register("exponential")
def _exponential(step: int, span: int, section: Schedule, floor: float) -> float:
    periods = step // section.decay_steps if section.staircase else step / section.decay_steps
    rate: float = section.decay_rate**periods
    return rate
