"""When nothing fits: the numbers, and the smallest change of the config that makes it fit, with its cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.config import Lora, Quantization
from luthier.errors import Fault
from luthier.plan.memory import GIB
from luthier.plan.support import Engine
from luthier.types import DataStats, Machine, ModelSpec

if TYPE_CHECKING:
    from luthier.plan.planner import Planned

SHORTEST = 64  # rows are not proposed to be cut below this


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
    place = "this machine" if on_host else "the host" if over_host else "the GPU"
    items = dict(need.host if over_host and not on_host else need.device)
    if on_host:
        items["process"] = need.host["process"]
    largest = sorted(items.items(), key=lambda pair: -pair[1])[:4]
    found = next(remedies(config, spec, stats, machine, engine), None)
    fix = f"{found.change}   ({found.cost})" if found else "a smaller base model, or a machine with more memory"
    return Fault(
        "training-no-memory",
        f"the run does not fit: the leanest plan needs {_gib(wanted)} of {place}",
        where=", ".join(f"{name} {_gib(size)}" for name, size in largest if size),
        received=f"longest row {leanest.job.longest:,} tokens, {spec.parameters / 1e9:.2f}B weights",
        allowed=f"{_gib(there)}: what is free, less a reserve (execution.memory_limit sets another limit)",
        fix=fix,
    )


def remedies(config: Any, spec: ModelSpec, stats: DataStats, machine: Machine, engine: Engine) -> Iterator[Remedy]:
    """Changes that make it fit, the one that changes least first; each was planned."""
    from luthier.plan.planner import best

    def fits(changed: Any, data: DataStats = stats) -> bool:
        return best(changed, spec, data, machine, engine=engine).fits

    changes: list[tuple[Any, str, str]] = [(config, "", "")]
    if config.trainer.enable_gradient_checkpointing is not True and config.execution.pins:
        free = config.model_copy(update={"execution": type(config.execution)()})
        changes.append((free, "leave the pins of execution: out", "the planner chooses them"))
    if config.adapter is None:
        changes.append(
            (config.model_copy(update={"adapter": Lora.model_validate({})}), "adapter: {type: lora}",
             "trains a small set of weights instead of all")
        )  # fmt: skip
    if config.quantization is None:
        adapter = config.adapter or Lora.model_validate({})
        note = "" if config.adapter else " and adapter: {type: lora}"
        changed = config.model_copy(update={"quantization": Quantization(), "adapter": adapter})
        changes.append((changed, f"quantization: {{bits: 4}}{note}", "the frozen weights are rounded to 4 bits"))
    for changed, said, cost in changes[1:]:
        if fits(changed):
            yield Remedy(said, cost)
    for changed, said, cost in changes:
        length = _longest_that_fits(lambda cut, changed=changed: fits(changed, _cut(stats, cut)), stats.longest)
        if length:
            rows = sum(1 for one in stats.lengths if one > length)
            lost = f"cuts {rows:,} of {len(stats.lengths):,} rows; the longest has {stats.longest:,} tokens"
            key = f"preprocessing.max_sequence_length: {length}"
            yield Remedy(f"{said} and {key}" if said else key, f"{cost}; {lost}" if cost else lost)


def _cut(stats: DataStats, length: int) -> DataStats:
    lengths = tuple(min(one, length) for one in stats.lengths)
    share = stats.supervised_tokens / stats.tokens if stats.tokens else 0.0
    return replace(stats, lengths=lengths, supervised_tokens=round(share * sum(lengths)))


def _longest_that_fits(fits: Any, longest: int) -> int:
    """The largest multiple of `SHORTEST` under ``longest`` that fits; 0 when none does."""
    low, high = 0, max(0, (longest - 1) // SHORTEST)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SHORTEST) else (low, middle - 1)
    return low * SHORTEST


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
