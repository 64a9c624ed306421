"""A forecast refined on the machine itself: a few steps of the base's first layers, through the code of training.

A model of a few GiB is probed whole. Of a larger one two heights tell what the whole will take, as a layer takes the
same wherever it stands: their difference is that of their layers, the rest is head, loss and what a step costs in any
case. Rows are made up, as long as those of steps that will come, small ones and large ones.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from luthier import events
from luthier.config import Config
from luthier.pipeline.opening import open_for_tuning
from luthier.plan.job import Job
from luthier.plan.planner import Planned
from luthier.plan.speed import speed
from luthier.types import Base, Example, Plan

LAYERS = {"cpu": (1, 3), "cuda": (2, 6)}  # the two heights; graphs leave the last layer out, so a GPU's have two
# Bytes of weights that a GPU's probe loads: of the whole model where that is no more. Small models need it most, as
# their steps are bound by the host at one height and by the device at another.
WHOLE = {"cpu": 0, "cuda": 3 * 2**30}
STEPS = {"cpu": (1, 2), "cuda": (5, 5)}  # steps that warm up, and that are timed
SOURCE = "a probe: the first layers of this base on this machine"


def can_probe(planned: Planned, base: Base) -> bool:
    """Whether there is something to time: a plan of the decoder that fits here, and the base's weights."""
    kind = planned.plan.device.split(":")[0]
    return planned.fits and planned.plan.model == "decoder" and kind in STEPS and any(base.path.glob("*.safetensors"))


def probed(settings: Config, base: Base, planned: Planned, sink: events.Sink = events.silent) -> Planned:
    """``planned`` with the time of a step as this machine takes it. Loads a few layers; seconds, not minutes."""
    job, plan = planned.job, planned.plan
    kind, most = plan.device.split(":")[0], job.shape.spec.layers
    low, high = (min(layers, most) for layers in LAYERS[kind])
    whole = job.compute * job.shape.linear <= WHOLE[kind] or high == most
    again = min(plan.recompute_layers, most)

    def measured(layers: int, recomputed: int) -> float:
        return _seconds(settings, base, planned, replace(plan, recompute_layers=recomputed), layers)

    with events.stage(sink, "probe", base.name if whole else f"the first {high} layers of {base.name}"):
        if whole:
            parts = {"step": measured(most, again)}
        else:
            few, many = measured(low, 0), measured(high, 0)
            layer = max(0.0, many - few) / (high - low)
            further = max(0.0, measured(high, high - 1) - many) / (high - 1) if again else 0.0
            parts = {
                "layers": most * layer,
                "recompute": again * further,
                "head, loss and update": max(0.0, few - low * layer),
            }
    found = replace(planned.speed, parts={name: seconds for name, seconds in parts.items() if seconds})
    return replace(planned, speed=found, rates=replace(planned.rates, calibrated=True, source=SOURCE))


def _steps_to_try(job: Job, plan: Plan) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The lengths of rows of steps that warm up and of those that are timed, from the smallest to the largest.

    They are different ones, as libraries have to look for a way whenever a length is new to them; but a graph is made
    for a length once, and then used again and again.
    """
    warm, timed = STEPS[plan.device.split(":")[0]]
    steps = sorted(job.steps, key=sum)

    def picked(count: int, offset: float) -> list[tuple[int, ...]]:
        return [steps[int(len(steps) * (place + offset) / count)] for place in range(count)]

    return (picked(timed, 0.5),) * 2 if plan.graphs else (picked(warm, 0.25), picked(timed, 0.5))


def _seconds(settings: Config, base: Base, planned: Planned, plan: Plan, layers: int) -> float:
    """The average step of the base cut to ``layers``: the median of the timed ones, each over what its rows are of it.

    By how much the times of steps of different lengths differ, the roofline says.
    """
    from luthier.objectives.sft import Sft
    from luthier.train.loop import optimizer_of
    from luthier.train.memory import give_back
    from luthier.train.setup import Setup
    from luthier.train.step import new_training, train_step

    job = planned.job
    warm, timed = _steps_to_try(job, plan)
    steps = [*warm, *timed]
    model = open_for_tuning(settings, base, job.precision, plan, events.silent, steps=len(steps), layers=layers)
    setup = Setup(
        model=model.module,
        logprobs=model.logprobs,
        objective=Sft(settings.trainer.loss_normalization),
        source=_Scripted([_examples(job, rows, number) for number, rows in enumerate(steps)]),
        plan=plan,
        trainer=settings.trainer,
        checkpoints=base.path,  # none is written
        precision=job.precision,
        leaner=lambda plan, longest: None,  # another plan's time would be no answer
    )
    model.module.train()
    training, seconds = new_training(setup, optimizer_of(setup)), []
    for rows in steps:
        started = time.perf_counter()
        train_step(setup, training, 1.0)
        took = time.perf_counter() - started
        expected = speed(replace(job, steps=(rows,)), planned.plan, planned.rates).seconds
        seconds.append(took * planned.speed.seconds / expected)
    del model, setup, training
    give_back()
    return statistics.median(seconds[len(warm) :])


def _examples(job: Job, rows: Sequence[int], step: int) -> list[Example]:
    """Made-up rows of those lengths, other ones each step; as many of their tokens are trained as of the real ones."""
    draw, vocab = random.Random(step), job.shape.spec.vocab
    start = random.Random(5).choices(range(vocab), k=job.shared)
    out = []
    for place, length in enumerate(rows):
        ids = [*start, *(draw.randrange(vocab) for _ in range(length - len(start)))][:length]
        prompt = round(length * (1 - job.share)) + (step % 3 - 1 if length > 8 else 0)
        prompt = min(length - 1, max(len(start), prompt))
        out.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt), step * len(rows) + place))
    return out


class _Scripted:
    """A `StepSource` of steps that are there already."""

    def __init__(self, steps: Sequence[list[Example]]) -> None:
        self.steps_per_epoch, self._steps = len(steps), iter(steps)

    def next_step(self) -> list[Example]:
        return next(self._steps)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        raise NotImplementedError("a probe is never resumed")
