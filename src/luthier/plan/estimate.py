"""What a plan means for a person: does it fit, how long, what does it cost. Pure numbers."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from luthier.errors import ConfigError
from luthier.plan.answering import Rate, step_seconds
from luthier.plan.job import Job
from luthier.plan.memory import GIB, MIB
from luthier.plan.planner import Planned, new_lengths
from luthier.plan.slots import ROWS
from luthier.plan.speed import RANGE, Span, as_timed

STARTUP = {"cuda": 15.0, "cpu": 6.0, "mps": 8.0}  # seconds: imports, device, adapter
READ = 1.0e9  # bytes a second that weights are read and placed with
CHECKPOINT = 12  # bytes a trained weight takes in a checkpoint: fp32 weight and two moments


@dataclass(frozen=True, slots=True)
class Times:
    """Where the time of a run goes."""

    step: Span
    epoch: Span
    start: Span  # loading, and what each padded length costs once
    evaluation: Span  # all of them
    total: Span
    tokens_per_second: Rate  # real tokens, of training
    calibrated: bool
    source: str


@dataclass(frozen=True, slots=True)
class Held:
    """The validation rows, and their tokens all together."""

    rows: int
    tokens: int


def times(planned: Planned, held: Held) -> Times:
    """Step, epoch and total, with evaluations of the rows that are ``held`` out."""
    job, plan, rates = planned.job, planned.plan, planned.rates
    sure = bool(planned.probed) or as_timed(job, plan, rates, planned.speed)
    low, high = RANGE[sure]

    def span(seconds: float) -> Span:
        return Span(seconds, low * seconds, high * seconds)

    step = span(planned.speed.seconds)
    per_token = planned.speed.seconds / max(planned.speed.tokens, 1)
    forward = _scored(job, held) * per_token / 3
    answers = _answers(planned, min(job.answers, held.rows))
    evaluation = span(evaluations_of(job, held) * (forward + answers))
    kind = plan.device.split(":")[0]
    once = new_lengths(job, plan) * job.total_steps
    start = span(STARTUP[kind] + 2 * job.shape.spec.parameters / READ + once)
    total = (step * job.total_steps).plus(evaluation).plus(start)
    return Times(
        step,
        step * job.steps_per_epoch,
        start,
        evaluation,
        total,
        Rate(*(planned.speed.tokens / seconds for seconds in (step.seconds, step.high, step.low))),
        sure,
        planned.probed or rates.source,
    )


def evaluations_of(job: Job, held: Held) -> int:
    """How often a run is evaluated: never where no row is held out."""
    return job.evaluations if held.rows else 0


def _scored(job: Job, held: Held) -> float:
    """Tokens whose loss an evaluation computes: of validation rows, and of training rows where they are asked for."""
    sides = [(held.rows, held.tokens), *([(job.rows, job.tokens)] if job.scores_training else [])]
    return sum(tokens * min(1.0, (job.scored or rows) / max(rows, 1)) for rows, tokens in sides)


def _answers(planned: Planned, count: int) -> float:
    """Seconds of generating the answers of ``count`` rows in one evaluation."""
    job, rates, plan = planned.job, planned.rates, planned.plan
    if not count:
        return 0.0
    mean = job.share * job.tokens / max(job.rows, 1)
    tokens = min(job.answer, 1.2 * mean + 8)
    rows = max(1, min(count, ROWS[plan.device.split(":")[0]]))
    weights = planned.memory.device["weights"]
    step = step_seconds(job, plan.model, plan.device.split(":")[0], rates, weights, rows, mean + tokens / 2)
    return tokens * step * count / rows


def disk_bytes(planned: Planned, keep_last: int) -> int:
    """What the run folder will take: checkpoints that are kept, one more while it is written, and the result."""
    return planned.job.trained.weights * (CHECKPOINT * (keep_last + 2) + 4)


def to_json(planned: Planned, told: Times) -> dict[str, Any]:
    """The plan and its forecast as JSON types; sizes in bytes, times in seconds."""
    job, memory = planned.job, planned.memory
    return {
        "fits": planned.fits,
        "plan": asdict(planned.plan),
        "precision": job.precision,
        "memory": {
            "device": dict(memory.device),
            "peak": memory.peak,
            "context": memory.context,
            "total": memory.total,
            "room": planned.room.device,
            "host": dict(memory.host),
            "host_total": memory.host_total,
            "host_room": planned.room.host,
        },
        "time": asdict(told) | {"parts": dict(planned.speed.parts)},
        "passes_per_step": planned.speed.passes,
        "tokens_per_step": planned.speed.tokens,
        "steps": job.total_steps,
        "steps_per_epoch": job.steps_per_epoch,
        "rows": job.rows,
        "longest": job.longest,
        "trained_weights": job.trained.weights,
    }


def seconds_of(text: str) -> float:
    """Seconds of a duration such as ``30m``, ``2h``, ``1h30m`` or ``90s``. Raises ConfigError config-bad-value."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([hms])", text.lower())
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([hms])|\s", "", text.lower()):
        allowed = "30m, 2h, 1h30m, 90s"
        raise ConfigError(
            "config-bad-value",
            f"{text!r} is no duration",
            where="--budget",
            received=text,
            allowed=allowed,
            fix="write hours, minutes and seconds with their letters",
        )
    return sum(float(number) * units[unit] for number, unit in parts)


def price_of(text: str) -> float:
    """The price of an hour from ``0.35/h`` or ``0.35``. Raises ConfigError config-bad-value."""
    found = re.fullmatch(r"\s*[$€£]?\s*(\d+(?:\.\d+)?)\s*(?:/\s*h(?:our)?)?\s*", text)
    if found is None:
        raise ConfigError(
            "config-bad-value",
            f"{text!r} is no price of an hour",
            where="--price",
            received=text,
            allowed="0.35/h",
            fix="write a number, with /h or without",
        )
    return float(found[1])


def gib(size: float) -> str:
    """A size in words; little ones in MiB, so that what is there is never told to be none."""
    if 0 < size < 0.1 * GIB:
        return f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{max(size / MIB, 0.1):.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def money(amount: float) -> str:
    """A price with two places behind the point, or as many as show two figures of it."""
    places = 2 if amount <= 0 else max(2, 1 - math.floor(math.log10(amount)))
    return f"{amount:.{places}f}"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ranged(span: Span, calibrated: bool) -> str:
    """A point for what was calibrated, a range for what was not."""
    return duration(span.seconds) if calibrated else f"{duration(span.low)} to {duration(span.high)}"
