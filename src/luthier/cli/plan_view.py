"""How `luthier plan` shows an estimate."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from luthier import console
from luthier.pipeline.budget import Affordable
from luthier.pipeline.planning import Estimate
from luthier.pipeline.space import Space
from luthier.pipeline.sweep import Sweep, Swept
from luthier.plan.answering import Answering, Rate, rate
from luthier.plan.cards import IMAGINED, UNKNOWN
from luthier.plan.estimate import duration, evaluations_of, gib, money, ranged
from luthier.plan.precision import declared_precision
from luthier.plan.speed import Span

CHOICES = ("device", "model", "tokens_per_pass", "attention", "recompute_layers", "offload_checkpoints", "mlp_tile",
           "weights", "embeddings", "optimizer", "loss_chunk", "graphs", "pad_to_multiple_of",
           "share_prefix")  # fmt: skip

HARDWARE = {"bf16": "the hardware has it", "fp16": "bf16 needs compute capability 8.0",
            "fp32": "the hardware has no bf16"}  # fmt: skip


def show(found: Estimate, space: Space, hourly: float | None, bought: Affordable | None, swept: Sweep | None) -> None:
    """The verdict first, then memory, time and the plan; what was assumed at the end."""
    out = Console(highlight=False)
    out.print(_verdict(found), soft_wrap=True)
    for one in found.remedies:
        out.print(Text(f"  would fit with  {one.change}   ({one.cost})"), soft_wrap=True)
    out.print(console.table("Memory", ["item", "size"], _memory(found)))
    out.print(console.table("Time", ["what", "how long"], _time(found, space, hourly)))
    answering = {"prediction": found.prediction}
    if found.planned.job.answers and evaluations_of(found.planned.job, found.need.held):
        answering["evaluation"] = found.evaluation
    out.print(console.table("Answers", ["what", *answering], _answers(list(answering.values()))))
    out.print(console.table("Plan", ["choice", "value", "why"], _plan(found)))
    if bought is not None:
        out.print(Text(_bought(bought, found)), soft_wrap=True)
    if swept is not None:
        _cards(out, swept, hourly)
    for note in (*found.need.notes, *_notes(found)):
        out.print(Text(f"note: {note}"), soft_wrap=True)


def show_sweep(swept: Sweep, hourly: float | None, refused: Sequence[str]) -> None:
    """The other cards, where this machine has ``refused`` the config."""
    out = Console(highlight=False)
    for message in refused:
        out.print(Text.assemble(("refused here", "bold red"), f": {message}"), soft_wrap=True)
    _cards(out, swept, hourly)


def _cards(out: Console, swept: Sweep, hourly: float | None) -> None:
    head = ["GPU", "fits", "peak", "plan", "step", "all of it", *_cost_head(hourly)]
    out.print(console.table("GPUs", head, [_card(one, hourly) for one in swept.cards]))
    if any(one.found is not None and not one.found.times.calibrated for one in swept.cards):
        out.print("* not calibrated: Luthier was not timed on it in a run like this, so a time is a range")
    for note in swept.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)


def _verdict(found: Estimate) -> Text:
    need, room = found.planned.memory, found.planned.room
    name = found.planned.rates.name
    on_cpu = found.planned.plan.device == "cpu"
    wanted, there = (need.host_total, room.host) if on_cpu else (need.total, room.device)
    if found.planned.fits:
        return Text.assemble(("fits", "bold green"), f" on {name}: {gib(wanted)} of {gib(there)} that may be used")
    fits_host = on_cpu or need.host_total <= room.host
    short = "" if fits_host else f"; the host needs {gib(need.host_total)} of {gib(room.host)}"
    if not there and room.kept:
        left = f"; all of the {gib(room.kept)} that is free is the reserve (execution.memory_limit sets another limit)"
    else:
        left = f" of {gib(there)}"
    return Text.assemble(("does not fit", "bold red"), f" on {name}: the leanest plan needs {gib(wanted)}{left}{short}")


def _memory(found: Estimate) -> list[list[str]]:
    need, room = found.planned.memory, found.planned.room
    rows = [[name, gib(size)] for name, size in need.device.items() if size]
    rows.append(["peak (what torch counts)", gib(need.peak)])
    if need.context:
        rows.append(["CUDA beside it", gib(need.context)])
        rows.append(["on the GPU in all", f"{gib(need.total)} of {gib(room.device)}"])
    if room.kept:
        rows.append(["left free as a reserve", gib(room.kept)])
    rows += [[f"host: {name}", gib(size)] for name, size in need.host.items()]
    return [*rows, ["on the host in all", f"{gib(need.host_total)} of {gib(room.host)}"]]


def _time(found: Estimate, space: Space, hourly: float | None) -> list[list[str]]:
    told, job, sure = found.times, found.planned.job, found.times.calibrated
    passes = found.planned.speed.passes
    rows = [
        ["rows", f"{job.rows:,}, longest {job.longest:,} tokens, {job.tokens:,} tokens in all"],
        ["a step", f"{ranged(told.step, sure)}   {job.batch} rows in {passes:.1f} passes"],
        ["speed", f"{_rate(told.tokens_per_second, sure)} tokens/s"],
        ["an epoch", f"{ranged(told.epoch, sure)}   {job.steps_per_epoch:,} steps"],
        ["start", ranged(told.start, sure)],
        ["evaluations", _evaluations(found)],
        ["in all", f"{ranged(told.total, sure)}   {job.total_steps:,} steps"],
    ]
    if hourly is not None:
        rows.append(["cost", _cost(told.total, sure, hourly)])
    base = found.need.base
    rows.append(["download", gib(base.download) if base.download else f"nothing: {base.source}"])
    return [*rows, ["disk", _disk(space)]]


def _evaluations(found: Estimate) -> str:
    count = evaluations_of(found.planned.job, found.need.held)
    return (
        f"{ranged(found.times.evaluation, found.times.calibrated)}   {count:,} of them"
        if count
        else "none: no row validates"
    )


def _disk(space: Space) -> str:
    base = f"{gib(space.download)} for the base and " if space.download else ""
    apart = space.download and not space.shared
    free = " and ".join(gib(size) for size in (space.free if apart else space.free[1:]))
    return f"{base}{gib(space.run)} for the run; {'' if space.enough else 'NOT ENOUGH: '}{free} free here"


def _answers(each: Sequence[Answering]) -> list[list[str]]:
    """A column each: of predicting with the result, and of evaluating between the steps of training."""
    items = dict.fromkeys(name for one in each for name in one.memory)
    rows = [["rows at once", *(f"{one.slots.rows}" for one in each)],
            ["longest row", *(f"{one.tokens:,} tokens" for one in each)],
            ["cache of a token", *(f"{one.token / 1024:.1f} KiB" for one in each)]]  # fmt: skip
    rows += [[name, *(gib(one.memory[name]) if name in one.memory else "" for one in each)] for name in items]
    rows.append(["in all", *(_room(one) for one in each)])
    rows.append(["tokens a second", *(_rate(rate(one.slots.rows, one.step), one.measured) for one in each)])
    rows.append(["of one row alone", *(_rate(rate(1, one.alone), one.measured) for one in each)])
    return [*rows, ["first token", *(ranged(one.first, one.measured) for one in each)]]


def _room(one: Answering) -> str:
    if not one.room:
        return f"{gib(one.total)}, and nothing is left: DOES NOT FIT"
    return f"{gib(one.total)} of {gib(one.room)}{'' if one.fits else ': DOES NOT FIT'}"


def _rate(found: Rate, sure: bool) -> str:
    return f"about {found.tokens:,.0f}" if sure else f"{found.low:,.0f} to {found.high:,.0f}"


def _plan(found: Estimate) -> list[list[str]]:
    plan, precision = found.planned.plan, found.planned.job.precision
    why = HARDWARE[precision] if declared_precision(found.need.config) == "auto" else "set in trainer:"
    rows = [[name, str(getattr(plan, name)), plan.reasons[name]] for name in CHOICES if name in plan.reasons]
    return [rows[0], ["precision", precision, why], *rows[1:]]


def _bought(bought: Affordable, found: Estimate) -> str:
    head = f"in {duration(bought.budget)}: "
    if not bought.fits:
        return head + "nothing, since no plan fits in memory"
    if not (bought.rows or bought.steps):
        return f"{head}not one step; the start alone takes {ranged(found.times.start, found.times.calibrated)}"
    sure = "" if found.times.calibrated else f", as {found.planned.rates.name} is not calibrated"
    return (
        f"{head}{_rows(bought, found)}{bought.steps:,} steps ({bought.epochs:g} epochs) of these rows; "
        f"assumed: {bought.mean:.0f} tokens a row, the longest {bought.longest:,}, "
        f"{bought.tokens_per_second:,.0f} tokens/s (the slow end of what is predicted{sure})"
    )


def _rows(bought: Affordable, found: Estimate) -> str:
    """The rows that can be afforded; nothing where their number does not decide how long a run takes."""
    if bought.rows is None:
        return ""
    epochs = found.need.config.trainer.epochs
    why = {"time": "", "memory": " (more do not fit in memory)", "count": " or more"}[bought.bound]
    beside = f" beside {bought.held:,} that validate" if bought.held else ""
    count = f"{bought.rows:,} rows{why}" if bought.rows else "not one batch of rows"
    return f"{count} for {epochs} epoch{'s' * (epochs != 1)}{beside}, or "


def _card(swept: Swept, hourly: float | None) -> list[str]:
    cost = [] if hourly is None else [""]
    one = swept.found
    if one is None:
        return [swept.gpu, "refused", "", swept.refused, "", "", *cost]
    plan, told, sure = one.planned.plan, one.times, one.times.calibrated
    row = [swept.gpu + ("" if sure else " *"), "yes" if one.planned.fits else "no", gib(one.planned.memory.total)]
    if not one.planned.fits:
        return [*row, "", "", "", *cost]
    again = f", {plan.recompute_layers} layers recomputed" if plan.recompute_layers else ""
    what = f"{plan.weights}, {plan.tokens_per_pass:,} tokens a pass{again}"
    cost = [] if hourly is None else [_cost(told.total, sure, hourly)]
    return [*row, what, ranged(told.step, sure), ranged(told.total, sure), *cost]


def _cost_head(hourly: float | None) -> list[str]:
    return [] if hourly is None else [f"at {hourly:g}/h"]


def _cost(span: Span, sure: bool, hourly: float) -> str:
    low, high = span.low / 3600 * hourly, span.high / 3600 * hourly
    return money(span.seconds / 3600 * hourly) if sure else f"{money(low)} to {money(high)}"


def _notes(found: Estimate) -> list[str]:
    told, name, machine = found.times, found.planned.rates.name, found.machine
    out = [f"the host is assumed to have {gib(machine.memory)} of memory"] if machine.system == IMAGINED else []
    if told.calibrated:
        return [*out, f"times are from {told.source}"]
    if name == UNKNOWN.name:
        dotted = ".".join(map(str, UNKNOWN.capability or ()))
        return [
            *out,
            f"a GPU of compute capability {dotted} is assumed, about as fast as a small one: times are a range",
        ]
    return [*out, f"{name} is not calibrated for such a run (known: {told.source}): times are a range"]
