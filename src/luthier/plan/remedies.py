"""When nothing fits: the numbers, and the smallest change of the config that makes it fit, with its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.config import Lora, Quantization, size_bytes
from luthier.errors import ConfigError, Fault
from luthier.plan.memory import GIB
from luthier.plan.support import Engine
from luthier.types import DataStats, Machine, ModelSpec

if TYPE_CHECKING:
    from luthier.plan.planner import Planned

SHORTEST = 64  # rows are not proposed to be cut below this
FEW = 0.05  # of the rows may lose their end before anything else of what is learned changes


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change that makes the run fit: the line of the config, and what it costs."""

    change: str
    cost: str


def refusal(
    config: Any, spec: ModelSpec, stats: DataStats, machine: Machine, engine: Engine, leanest: Planned
) -> Fault:
    """The fault of a run that cannot fit, with the leanest plan's numbers and the smallest change that helps."""
    need, room, on_host = leanest.memory, leanest.room, leanest.plan.device == "cpu"
    over_host = need.host_total > room.host
    wanted, there = (need.host_total, room.host) if over_host else (need.total, room.device)
    items = dict(need.host if over_host and not on_host else need.device)
    if on_host:
        items["process"] = need.host["process"]
    largest = sorted(items.items(), key=lambda pair: -pair[1])[:4]
    found = next(remedies(config, spec, stats, machine, engine))
    return Fault(
        "training-no-memory",
        f"the run does not fit: the leanest plan needs {_gib(wanted)} of {_place(leanest)}",
        where=", ".join(f"{name} {_gib(size)}" for name, size in largest if size),
        received=f"longest row {leanest.job.longest:,} tokens, {spec.parameters / 1e9:.2f}B weights",
        allowed=_allowed(there, room.kept),
        fix=f"{found.change}   ({found.cost})",
    )


def remedies(config: Any, spec: ModelSpec, stats: DataStats, machine: Machine, engine: Engine) -> Iterator[Remedy]:
    """What makes it fit, what loses least first; each was planned. The last resort, a smaller base, where nothing does.

    First the user's own limits and pins, then what an evaluation takes, then what is learned.
    """
    from luthier.plan.planner import best

    def plan(changed: Any, data: DataStats = stats) -> Planned:
        return best(changed, spec, data, machine, engine=engine)

    def fits(changed: Any, data: DataStats = stats) -> bool:
        try:
            return plan(changed, data).fits
        except ConfigError:  # a pin that works only beside the one that was left out
            return False

    leanest = plan(config)
    found = 0
    for changes in (_limits(config, leanest), _pins(config), _evaluation(config)):
        if enough := next((change for change in changes if fits(change.config)), None):
            found += 1
            yield Remedy(enough.said, enough.cost)
    whole = Change(config, "", "")
    learned = list(_learned(config, stats, whole, fits))
    if not (found or learned) and (least := list(_evaluation(config))):  # both together, then
        learned = list(_learned(least[-1].config, stats, least[-1], fits))
    yield from learned
    if not (found or learned):
        need, room = leanest.memory, leanest.room
        lacking = need.host_total - room.host if need.host_total > room.host else need.total - room.device
        resort = "a smaller base model, or a machine with more memory"
        yield Remedy(resort, f"the leanest plan lacks {_gib(lacking)} of {_place(leanest)}")


@dataclass(frozen=True, slots=True)
class Change:
    """A changed config, the lines of it, and what they cost."""

    config: Any
    said: str
    cost: str

    def then(self, config: Any, said: str, cost: str) -> Change:
        """This change and another."""
        return Change(config, f"{self.said} and {said}" if self.said else said, f"{self.cost}; {cost}".lstrip("; "))


def _limits(config: Any, leanest: Planned) -> Iterator[Change]:
    """The declared limits, raised to what the leanest plan needs."""
    need, declared = leanest.memory, config.execution
    device = need.host_total if leanest.plan.device == "cpu" else need.total
    raised = {
        key: _at_least(wanted)
        for key, wanted in (("memory_limit", device), ("host_memory_limit", need.host_total))
        if getattr(declared, key) and size_bytes(getattr(declared, key)) < wanted
    }
    if raised:
        said = " and ".join(f"execution.{key}: {size}" for key, size in raised.items())
        yield Change(_with(config, "execution", **raised), said, "takes more of the memory that is free")


def _pins(config: Any) -> Iterator[Change]:
    """One pin less, or none. A switch that forbids recomputing is one too."""
    if config.trainer.enable_gradient_checkpointing is False:
        config = _with(config, "trainer", enable_gradient_checkpointing="auto")
        yield Change(config, "trainer.enable_gradient_checkpointing: auto", "some layers are computed twice")
    pins = config.execution.pins
    for name in pins:
        yield Change(_with(config, "execution", **{name: "auto"}), f"execution.{name}: auto", "the planner chooses it")
    if len(pins) > 1:
        free = _with(config, "execution", **dict.fromkeys(pins, "auto"))
        yield Change(free, "leave the pins of execution: out", "the planner chooses them")


def _evaluation(config: Any) -> Iterator[Change]:
    """Evaluating with less, then without answers."""
    batch, rows = config.trainer.eval_batch_size, config.trainer.eval_generation_rows
    now = Change(config, "", "")
    if isinstance(batch, int) and batch > 1:
        changed = _with(now.config, "trainer", eval_batch_size=1)
        yield (now := now.then(changed, "trainer.eval_batch_size: 1", "evaluations take longer"))
    if rows != 0:
        changed = _with(now.config, "trainer", eval_generation_rows=0)
        yield now.then(changed, "trainer.eval_generation_rows: 0", "no sample answers between the steps")


def _learned(config: Any, stats: DataStats, start: Change, fits: Callable[[Any, DataStats], bool]) -> Iterator[Remedy]:
    """What changes what is learned: a few rows cut, fewer weights trained, weights rounded, many rows cut."""
    changes = [start]
    if config.adapter is None:
        lora = Lora.model_validate({})
        changes.append(start.then(config.model_copy(update={"adapter": lora}), "adapter: {type: lora}",
                                  "trains a small set of weights instead of all"))  # fmt: skip
    if config.quantization is None:
        rounded = changes[-1].config.model_copy(update={"quantization": Quantization()})
        changes.append(changes[-1].then(rounded, "quantization: {bits: 4}", "the frozen weights are rounded to 4 bits"))
    enough = [change for change in changes[1:] if fits(change.config, stats)]
    cuts, longest = [], 0
    for change in (change for change in changes if change not in enough):
        length = _longest_that_fits(lambda cut, of=change.config: fits(of, _cut(stats, cut)), stats.longest)
        if length > longest:  # else another change would be made for nothing
            longest = length
            cuts.append((change, length, sum(1 for one in stats.lengths if one > length)))
    few = [cut for cut in cuts if cut[2] <= FEW * len(stats.lengths)][:1]
    yield from (_cutting(*cut, stats) for cut in few)
    yield from (Remedy(change.said, change.cost) for change in enough)
    yield from (_cutting(*cut, stats) for cut in cuts if cut not in few)


def _cutting(change: Change, length: int, rows: int, stats: DataStats) -> Remedy:
    lost = f"cuts {rows:,} of {len(stats.lengths):,} rows; the longest has {stats.longest:,} tokens"
    both = change.then(change.config, f"preprocessing.max_sequence_length: {length}", lost)
    return Remedy(both.said, both.cost)


def _with(config: Any, section: str, **values: Any) -> Any:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _at_least(size: int) -> str:
    return f"{math.ceil(100 * size / GIB) / 100:g}GiB"


def _allowed(there: int, kept: int) -> str:
    """What may be used, in words."""
    how = "execution.memory_limit sets another limit"
    if not there and kept:
        return f"nothing: all of the {_gib(kept)} that is free is the reserve ({how})"
    return f"{_gib(there)}: what is free, less a reserve ({how})"


def _place(planned: Planned) -> str:
    if planned.plan.device == "cpu":
        return "this machine"
    return "the host" if planned.memory.host_total > planned.room.host else "the GPU"


def _cut(stats: DataStats, length: int) -> DataStats:
    lengths = tuple(min(one, length) for one in stats.lengths)
    share = stats.supervised_tokens / stats.tokens if stats.tokens else 0.0
    supervised = round(share * sum(lengths))
    if length > max((stats.shared_prefix or 0, *(tokens for _, tokens in stats.beginnings))):
        return replace(stats, lengths=lengths, supervised_tokens=supervised)
    alike = stats.shared_prefix if stats.shared_prefix is None else 0  # what is left of a beginning, nobody knows
    return replace(stats, lengths=lengths, supervised_tokens=supervised, shared_prefix=alike, beginnings=())


def _longest_that_fits(fits: Any, longest: int) -> int:
    """The largest multiple of `SHORTEST` under ``longest`` that fits; 0 when none does."""
    low, high = 0, max(0, (longest - 1) // SHORTEST)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SHORTEST) else (low, middle - 1)
    return low * SHORTEST


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
