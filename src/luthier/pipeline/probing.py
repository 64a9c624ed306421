"""A forecast refined on the machine itself: a few steps of the base, through the code of training.

A model of a few GiB is run whole. Of a larger one two heights tell what the whole will take, as a layer takes the
same wherever it stands: their difference is that of their layers, the rest is head, loss and what a step costs in any
case. Rows are made up, as long as those of steps that will come, small ones and large ones. A step that would take
longer than a probe may is cut to some of its rows, a row to some of its tokens.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier import events
from luthier.config import Config
from luthier.pipeline.opening import open_for_tuning
from luthier.plan.job import Job
from luthier.plan.passes import Steps
from luthier.plan.planner import Planned
from luthier.plan.speed import speed
from luthier.types import Base, Example, Plan

# The two heights. With graphs the host still starts the last layer and the loss: lower heights would wait for it.
LAYERS, GRAPHED = {"cpu": (1, 3), "cuda": (2, 6)}, (8, 16)
# Bytes of weights that a probe loads: of the whole model where that is no more. Small models need it most: on a CPU the
# difference of two heights is multiplied by many layers, its noise with it, and a GPU waits for the host at one height
# and not at the other.
WHOLE = {"cpu": 2**29, "cuda": 3 * 2**30}
STEPS = {"cpu": 2, "cuda": 5}  # of different sizes, once to warm up, then timed until that took so many seconds
SECONDS = 1.5
ROUNDS = 6  # or so often
BUDGET = 12.0  # seconds of steps in all: warming up and timing end then, with what was timed
LEAST = 32  # tokens of a row beside a shared beginning: less would be a step's fixed costs
SOURCE = "a probe: {} on this machine"


@dataclass(frozen=True, slots=True)
class Timed:
    """What a step of a height was found to take. ``part``: how what was timed is less than whole steps, warmed up."""

    seconds: float
    part: str = ""


def can_probe(planned: Planned, base: Base) -> bool:
    """Whether there is something to time: a plan that fits here, and weights; of the generic path, few of them."""
    kind = planned.plan.device.split(":")[0]
    known = planned.plan.model == "decoder" or _whole(planned)
    return planned.fits and known and kind in STEPS and any(base.path.glob("*.safetensors"))


def _whole(planned: Planned) -> bool:
    kind, job = planned.plan.device.split(":")[0], planned.job
    return job.compute * job.shape.linear <= WHOLE.get(kind, 0)


def probed(settings: Config, base: Base, planned: Planned, sink: events.Sink = events.silent) -> Planned:
    """``planned`` with the time of a step as this machine takes it. Seconds, not minutes: see `BUDGET`."""
    job, plan = planned.job, planned.plan
    kind, most = plan.device.split(":")[0], job.shape.spec.layers
    low, high = (min(layers, most) for layers in (GRAPHED if plan.graphs else LAYERS[kind]))
    whole = _whole(planned) or high == most
    again = min(plan.recompute_layers, most)

    budget, parted = BUDGET / (1 if whole else 3 if again else 2), set[str]()

    def measured(layers: int | None, recomputed: int) -> float:
        tried = replace(plan, recompute_layers=recomputed)
        found = _seconds(settings, base, planned, tried, layers, budget)
        parted.add(found.part)
        return found.seconds

    part = "" if whole else f"the first {high} layers of "
    with events.stage(sink, "probe", f"{part}{base.name}"):
        if whole:
            parts = {"step": measured(None, again)}
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
    told = "".join(sorted(f", {one}" for one in parted if one))
    return replace(planned, speed=found, probed=SOURCE.format(f"{part}this base") + told)


def _steps_to_try(job: Job, plan: Plan) -> list[tuple[int, ...]]:
    """The lengths of the rows of a few steps, from the smallest to the largest."""
    steps, count = sorted(job.steps, key=sum), STEPS[plan.device.split(":")[0]]
    return [steps[int(len(steps) * (place + 0.5) / count)] for place in range(count)]


def _cut(rows: tuple[int, ...], planned: Planned, most: float) -> tuple[int, ...]:
    """So many of the rows, and at last so much of the first, as are expected to take ``most`` seconds."""
    while len(rows) > 1 and _expected(rows, planned) > most:
        rows = rows[: len(rows) // 2]
    least = max((tokens for _, tokens in planned.job.beginnings), default=0) + LEAST
    while rows[0] > least and _expected(rows, planned) > most:
        rows = (max(least, rows[0] // 2),)
    return rows


def _expected(rows: tuple[int, ...], planned: Planned) -> float:
    """Seconds of a step of those rows, by the roofline."""
    return speed(replace(planned.job, steps=Steps([rows])), planned.plan, planned.rates).seconds


def _seconds(
    settings: Config, base: Base, planned: Planned, plan: Plan, layers: int | None, budget: float = BUDGET
) -> Timed:
    """The average step of the base cut to ``layers``: the median of the timed ones, each over what its rows are of it.

    By how much the times of steps of different lengths differ, the roofline says. Ends ``budget`` seconds after the
    first step began, or with the step that is taken then.
    """
    from luthier.objectives.sft import Sft
    from luthier.train.loop import optimizer_of
    from luthier.train.memory import give_back
    from luthier.train.setup import Setup
    from luthier.train.state import new_training
    from luthier.train.step import train_step

    job, whole = planned.job, _steps_to_try(planned.job, plan)
    height = (layers or job.shape.spec.layers) / job.shape.spec.layers
    steps = [_cut(rows, planned, budget / (2 * len(whole)) / height) for rows in whole]
    script = [(rows, _examples(job, rows, number)) for number, rows in enumerate(steps * (1 + ROUNDS))]
    settings = _drawn(settings)
    model = open_for_tuning(settings, base, job.precision, plan, events.silent, steps=len(script), layers=layers)
    setup = Setup(
        model=model.module,
        logprobs=model.logprobs,
        objective=Sft(settings.trainer.loss_normalization),
        source=_Scripted([examples for _, examples in script]),
        plan=plan,
        trainer=settings.trainer,
        checkpoints=base.path,  # none is written
        precision=job.precision,
        leaner=lambda plan, longest: None,  # another plan's time would be no answer
    )
    model.module.train()
    training, begun = new_training(setup, optimizer_of(setup)), time.perf_counter()
    warming, seconds, total = list[float](), list[float](), 0.0
    for rows, _ in script:
        started = time.perf_counter()
        train_step(setup, training, 1.0)
        took = time.perf_counter() - started
        average = took * planned.speed.seconds / _expected(rows, planned)
        if len(warming) < len(steps):
            warming.append(average)
        else:
            seconds.append(average)
            total += took
        if (seconds and len(seconds) % len(steps) == 0 and total > SECONDS) or started + took - begun > budget:
            break
    del model, setup, training
    give_back()
    if not seconds:
        return Timed(warming[-1], "of which a step took longer than a probe may, its start included")
    parted = sum(map(sum, steps)), sum(map(sum, whole))
    return Timed(statistics.median(seconds), "in parts of its steps" if parted[0] < parted[1] else "")


def _drawn(settings: Config) -> Config:
    """The same with factors of the same size that are drawn: how they start takes no part in a step's time."""
    section: Any = settings.adapter
    if not hasattr(section, "takes_out"):
        return settings
    times = 2 if section.takes_out else 1
    changed = {"init_lora_weights": "default", "r": times * section.r}
    return settings.model_copy(update={"adapter": section.model_copy(update=changed)})


def _examples(job: Job, rows: Sequence[int], step: int) -> list[Example]:
    """Made-up rows of those lengths, other ones each step; as many of their tokens are trained as of the real ones."""
    draw, vocab = random.Random(step), job.shape.spec.vocab
    starts = [random.Random(5 + n).choices(range(vocab), k=k) for n, (_, k) in enumerate(job.beginnings)]
    parts = [part for part, _ in job.beginnings]
    mixed = random.Random(f"beginnings of {step}").choices(
        [*starts, []], [*parts, max(0.0, 1 - sum(parts))], k=len(rows)
    )
    out = []
    for place, (length, start) in enumerate(zip(rows, mixed, strict=True)):
        ids = [*start, *draw.choices(range(vocab), k=max(0, length - len(start)))][:length]
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
