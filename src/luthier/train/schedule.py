"""The learning rate as a function of the optimizer step; never of the micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from luthier.registry import Registry

if TYPE_CHECKING:
    from luthier.config.trainer import Scheduler

# after warm-up: (steps since it, steps from it to the end, section, steps per epoch) → factor
Decay = Callable[[int, int, "Scheduler", int], float]
DECAYS: Registry[Decay] = Registry("learning rate decay")


def warmup_steps(section: Scheduler, total: int) -> int:
    """Optimizer steps of the warm-up: declared, or the fraction of all steps, rounded up."""
    declared = section.warmup_steps
    return min(total, math.ceil(section.warmup_fraction * total - 1e-9) if declared is None else declared)


def factor(section: Scheduler, step: int, total: int, per_epoch: int) -> float:
    """What to multiply the learning rate by in optimizer step ``step`` (from 0) of ``total``.

    The warm-up rises linearly and reaches 1 in its last step, so no step is spent at 0.
    """
    warm = warmup_steps(section, total)
    if step < warm:
        return (step + 1) / warm
    return DECAYS.get(section.decay or "constant", where="trainer.learning_rate_scheduler.decay")(
        step - warm, max(1, total - warm), section, per_epoch
    )


@DECAYS.register("constant")
def _constant(step: int, span: int, section: Scheduler, per_epoch: int) -> float:
    return 1.0


@DECAYS.register("linear")
def _linear(step: int, span: int, section: Scheduler, per_epoch: int) -> float:
    return section.eta_min + (1 - section.eta_min) * max(0.0, 1 - step / span)


@DECAYS.register("cosine")
def _cosine(step: int, span: int, section: Scheduler, per_epoch: int) -> float:
    return section.eta_min + (1 - section.eta_min) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / span)))


@DECAYS.register("exponential")
def _exponential(step: int, span: int, section: Scheduler, per_epoch: int) -> float:
    rate: float = section.decay_rate ** (step / (section.decay_steps or per_epoch))
    return rate
