"""A forecast refined on the machine itself: a few steps of the base's first layers, through the code of training.

What a layer takes is the same for all of them, so two heights of the same model tell what the whole will take: the
difference is that of their layers, the rest is head, loss and what a step costs in any case. Both heights run the plan
that was chosen, on made-up rows as long as those of a typical step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from luthier import events
from luthier.config import Config
from luthier.data.source import TableSource
from luthier.pipeline.opening import open_for_tuning
from luthier.plan.job import Job
from luthier.plan.planner import Planned
from luthier.plan.speed import speed
from luthier.types import Base, Example, Plan

LAYERS = {"cpu": (1, 3), "cuda": (2, 6)}  # the two heights; graphs leave the last layer out, so a GPU's have two
STEPS = {"cpu": (1, 2), "cuda": (4, 6)}  # steps that warm up, and that are timed
SOURCE = "a probe: the first layers of this base on this machine"


def can_probe(planned: Planned, base: Base) -> bool:
    """Whether there is something to time: a plan of the decoder that fits here, and the base's weights."""
    kind = planned.plan.device.split(":")[0]
    return planned.fits and planned.plan.model == "decoder" and kind in STEPS and any(base.path.glob("*.safetensors"))


def probed(settings: Config, base: Base, planned: Planned, sink: events.Sink = events.silent) -> Planned:
    """``planned`` with the time of a step as this machine takes it. Loads a few layers; seconds, not minutes."""
    job, plan = planned.job, planned.plan
    rows = _typical(job)
    kind, most = plan.device.split(":")[0], job.shape.spec.layers
    low, high = (min(layers, most) for layers in LAYERS[kind])
    again = min(plan.recompute_layers, most)
    with events.stage(sink, "probe", f"the first {high} layers of {base.name}"):

        def measured(layers: int, recomputed: int) -> float:
            tried = replace(plan, recompute_layers=recomputed)
            return _seconds(settings, base, planned, tried, rows, layers)

        few, many = measured(low, 0), measured(high, 0)
        layer = max(0.0, many - few) / max(high - low, 1)
        further = max(0.0, measured(high, high - 1) - many) / max(high - 1, 1) if again and high > 1 else 0.0
    parts = {
        "layers": most * layer,
        "recompute": again * further,
        "head, loss and update": max(0.0, few - low * layer),
    }
    # the steps differ in length; by how much their times do, the roofline says
    same = speed(replace(job, steps=(rows,)), plan, planned.rates).seconds
    scale = planned.speed.seconds / same if same else 1.0
    found = replace(planned.speed, parts={name: scale * seconds for name, seconds in parts.items() if seconds})
    return replace(planned, speed=found, rates=replace(planned.rates, calibrated=True, source=SOURCE))


def _typical(job: Job) -> tuple[int, ...]:
    """The lengths of the step whose tokens are in the middle of all."""
    steps = sorted(job.steps, key=sum)
    return steps[len(steps) // 2]


def _seconds(settings: Config, base: Base, planned: Planned, plan: Plan, rows: Sequence[int], layers: int) -> float:
    """The median step of the base cut to ``layers``."""
    from luthier.objectives.sft import Sft
    from luthier.train.loop import optimizer_of
    from luthier.train.memory import give_back
    from luthier.train.setup import Setup
    from luthier.train.step import new_training, train_step

    job = planned.job
    warm, timed = STEPS[plan.device.split(":")[0]]
    model = open_for_tuning(settings, base, job.precision, plan, events.silent, steps=warm + timed, layers=layers)
    setup = Setup(
        model=model.module,
        logprobs=model.logprobs,
        objective=Sft(settings.trainer.loss_normalization),
        source=TableSource(_examples(job, rows, warm + timed), len(rows), 0, "probe", shuffle=False),
        plan=plan,
        trainer=settings.trainer,
        checkpoints=base.path,  # none is written
        precision=job.precision,
        leaner=lambda plan, longest: None,  # another plan's time would be no answer
    )
    model.module.train()
    training, seconds = new_training(setup, optimizer_of(setup)), []
    for _ in range(warm + timed):
        started = time.perf_counter()
        train_step(setup, training, 1.0)
        seconds.append(time.perf_counter() - started)
    del model, setup, training
    give_back()
    return statistics.median(seconds[warm:])


def _examples(job: Job, rows: Sequence[int], steps: int) -> list[Example]:
    """Made-up rows of those lengths for every step; as many of their tokens are trained as of the real ones."""
    draw, vocab = random.Random(5), job.shape.spec.vocab
    start = [draw.randrange(vocab) for _ in range(job.shared)]
    out = []
    for step in range(steps):
        for place, length in enumerate(rows):
            ids = [*start, *(draw.randrange(vocab) for _ in range(length - len(start)))][:length]
            prompt = min(length - 1, max(len(start), round(length * (1 - job.share))))
            out.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt), step * len(rows) + place))
    return out
