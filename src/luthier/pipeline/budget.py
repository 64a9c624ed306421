"""`luthier plan --budget`: how many rows, or steps of the rows there are, fit in a time.

Another number of rows has another plan, other evaluations and another memory, so what is proposed is planned itself: it
fits, and one batch or one step more does not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Literal

from luthier.pipeline.planning import Estimate, Need
from luthier.plan import estimate, planner
from luthier.plan.estimate import Held, Times
from luthier.plan.planner import Planned
from luthier.plan.speed import speed

MOST_ROWS = 5_000_000  # more are not planned for
Measured = tuple[float, float] | None
Forecast = tuple[Planned, Times]
Bound = Literal["time", "memory", "count"]


@dataclass(frozen=True, slots=True)
class Affordable:
    """What fits in a time at the slow end of what is predicted."""

    budget: float
    fits: bool  # whether the rows that there are fit in memory, however long it takes
    rows: int | None  # of training, at the config's epochs; None where trainer.train_steps decides, not they
    held: int  # validation rows beside them
    bound: Bound  # why they are not more
    steps: int  # of the rows that there are
    epochs: float  # which those steps are
    longest: int  # of the rows assumed, as are the next two
    mean: float
    tokens_per_second: float


def affordable(found: Estimate, budget: float, measured: Measured = None) -> Affordable:
    """The largest number of rows, and of steps, that fits in ``budget`` seconds. ``measured``: as of `estimate_of`."""
    job, need, pace = found.planned.job, found.need, _pace(found)

    def told(forecast: Forecast, rows: int | None, steps: int, held: int, bound: Bound) -> Affordable:
        one, took = forecast[0].job, forecast[1]
        epochs = 10 * steps // job.steps_per_epoch / 10  # rounded down
        mean, fits = one.tokens / max(one.rows, 1), found.planned.fits
        slow = took.tokens_per_second.low
        return Affordable(budget, fits, rows, held, bound, steps, epochs, one.longest, mean, slow)

    present = found.planned, found.times
    if not found.planned.fits:
        return told(present, 0, 0, 0, "memory")

    def seconds(one: Forecast) -> float:
        return one[1].total.high if one[0].fits else inf

    @cache
    def in_batches(count: int) -> Forecast:
        return _forecast(found, with_rows(need, count * job.batch), measured, pace)

    once = found.times.start.high
    most = max(0.0, budget - once) / (found.times.total.high - once)  # in runs like the present one
    steps = _largest(
        lambda count: seconds(_forecast(found, with_steps(need, count), measured, pace)),
        budget, once, round(most * job.total_steps),
    )  # fmt: skip
    if need.config.trainer.train_steps is not None:
        return told(present, None, steps, need.held.rows, "time")
    top = max(1, MOST_ROWS // job.batch)
    count = _largest(lambda count: seconds(in_batches(count)), budget, once, round(most * job.steps_per_epoch), top)
    bound: Bound = "count" if count == top else "time" if in_batches(count + 1)[0].fits else "memory"
    held = with_rows(need, count * job.batch).held.rows
    return told(in_batches(max(count, 1)), count * job.batch, steps, held, bound)


def with_rows(need: Need, count: int) -> Need:
    """The same training on ``count`` rows of such lengths, the longest among them, and as large a share held out."""
    stats, rows = need.stats, len(need.stats.lengths)
    whole, rest = divmod(count, rows)
    descending = sorted(range(rows), key=lambda index: -stats.lengths[index])
    chosen = sorted(descending[place * rows // rest] for place in range(rest))
    lengths = array("i", stats.lengths) * whole + array("i", [stats.lengths[index] for index in chosen])
    part = sum(lengths) / max(stats.tokens, 1)
    held = Held(round(need.held.rows * count / rows), round(need.held.tokens * count / rows))
    changed = replace(stats, lengths=lengths, supervised_tokens=round(stats.supervised_tokens * part))
    return replace(need, stats=changed, held=held)


def with_steps(need: Need, count: int) -> Need:
    """The same training of so many steps."""
    trainer = need.config.trainer.model_copy(update={"train_steps": count})
    return replace(need, config=need.config.model_copy(update={"trainer": trainer}))


def _pace(found: Estimate) -> float:
    """A step's time over what the roofline says of it, where a probe has timed it."""
    planned = found.planned
    return planned.speed.seconds / speed(planned.job, planned.plan, planned.rates).seconds if planned.probed else 1.0


def _forecast(found: Estimate, need: Need, measured: Measured, pace: float) -> Forecast:
    """``need`` planned on the machine of ``found``, at the pace that was found there."""
    made = planner.best(need.config, need.base.spec, need.stats, found.machine, engine=need.engine, measured=measured)
    parts = {name: pace * seconds for name, seconds in made.speed.parts.items()}
    made = replace(made, speed=replace(made.speed, parts=parts), probed=found.planned.probed)
    return made, estimate.times(made, need.held)


def _largest(cost: Callable[[int], float], budget: float, once: float, guess: int, top: int = 2**31) -> int:
    """A count up to ``top`` that costs at most ``budget`` while one more costs more; 0 where 1 does.

    None costs about ``once``, and each as much more, so each try is where a line through those before it
    meets the budget; every fifth one is halfway, for where there is no such line.
    """
    low, high, below, above = 0, top + 1, once, inf
    at, tried = guess, 0
    while high - low > 1:
        at = min(max(at, low + 1), high - 1)
        took = cost(at)
        low, below, high, above = (at, took, high, above) if took <= budget else (low, below, at, took)
        tried += 1
        if above < inf and below < above and tried % 5:
            at = low + int((high - low) * (budget - below) / (above - below))
        elif high <= top:
            at = (low + high) // 2
        else:
            at = low + 1 + int(max(1.0, low * (budget - below) / max(below - once, 1e-9)))
    return low


__all__: Sequence[str] = ["Affordable", "affordable", "with_rows", "with_steps"]
