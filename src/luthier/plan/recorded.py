"""The plan of a run that goes on: the recorded one, unless the machine or the pins are no longer the same.

A plan is part of its run. It is executed as recorded, so that a resumed run repeats a straight one; a new plan that is
forced gives the same gradients up to rounding only, and is told and appended to the lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from luthier.plan.job import movable
from luthier.plan.planner import forecast
from luthier.types import DataStats, Machine, ModelSpec, Plan

SHRINK = 2  # tokens of a pass are divided by this when memory runs out
CHUNKS, LEAST_CHUNK = 4, 64  # the same of tokens whose logits exist at a time, and how few these can become
TILES = (1024, 256)  # tokens of a feed-forward layer at a time


def continued(
    recorded: Plan,
    new: Plan,
    *,
    config: Any,
    spec: ModelSpec,
    stats: DataStats,
    machine: Machine,
    made_on: Mapping[str, Any],
    pins: Mapping[str, Any],
) -> tuple[Plan, str]:
    """The plan to go on with, and what forced another one than the ``recorded`` ("" when nothing did).

    ``made_on``: the machine (JSON form) that the recorded plan was made for. ``pins``: the `execution:` section then.
    """
    now = config.execution.model_dump(mode="json")
    changed = [key for key in now if key in pins and now[key] != pins[key]]
    if changed:
        return new, f"execution.{changed[0]} was {pins[changed[0]]} and is {now[changed[0]]}"
    before, here = _hardware(made_on), _hardware(asdict(machine))
    if before != here:
        return new, f"another machine: {before} then, {here} now"
    need = forecast(config, spec, stats, machine, recorded).memory
    # Without a reserve: on the machine that it was made for, a plan that fits is not made anew for a little more load.
    wants = {"": (need.host_total, machine.free_memory)}
    if recorded.device != "cpu":
        index = int(recorded.device.partition(":")[2] or 0)
        wants = {"": (need.total, machine.gpus[index].free), " of host memory": (need.host_total, machine.free_memory)}
    for kind, (wanted, free) in wants.items():
        if wanted > free:
            text = f"the recorded plan needs {wanted / 2**30:.1f} GiB{kind}, and {free / 2**30:.1f} are free now"
            return new, text
    return recorded, ""


def leaner(plan: Plan, longest: int, layers: int = 0) -> Plan | None:
    """The next plan after memory ran out in a step; None when nothing leaner is left. Its reasons say so.

    No graphs, whose memory nothing else can use; half the tokens a pass, down to the ``longest`` row of the step; then
    all ``layers`` recomputed (0: the model cannot change how it is executed while it trains). Luthier's decoder then
    makes logits of fewer tokens at a time, works tile by tile, and moves the inputs of its layers to the host at last.
    """
    tokens, again = plan.tokens_per_pass, plan.recompute_layers
    if plan.graphs:
        return _changed(plan, "graphs", False, "them")
    if tokens > longest:
        return _changed(plan, "tokens_per_pass", max(longest, tokens // SHRINK), f"{tokens:,}")
    if again < layers:
        return _changed(plan, "recompute_layers", layers, str(again))
    if plan.model != "decoder" or not layers:
        return None
    if plan.loss_chunk > LEAST_CHUNK:
        return _changed(plan, "loss_chunk", max(LEAST_CHUNK, plan.loss_chunk // CHUNKS), f"{plan.loss_chunk:,}")
    tile = min(plan.mlp_tile or tokens, tokens)
    if smaller := next((size for size in TILES if size < tile), 0):
        return _changed(plan, "mlp_tile", smaller, f"{tile:,} tokens at a time")
    if plan.device.startswith("cuda") and not plan.offload_checkpoints:
        return _changed(plan, "offload_checkpoints", True, "them on the device")
    return None


def more_room(plan: Plan, config: Any, spec: ModelSpec) -> tuple[str, ...]:
    """`execution:` keys that take less of the device than ``plan``, which only a new plan can change."""
    if plan.model != "decoder" or not plan.device.startswith("cuda"):
        return ()
    out = []
    if config.adapter is not None and plan.weights != "streamed":
        spread = plan.weights == "resident" and config.quantization is not None
        out.append(f"execution.weights={'quantised' if spread else 'streamed'}")
    if state_on_host(plan, config.trainer.optimizer):
        out.append("execution.optimizer=host")
    if plan.embeddings == "device" and not spec.tied_embeddings:
        out.append("execution.embeddings=host")
    return tuple(out)


def state_on_host(plan: Plan, optimizer: Any) -> Plan | None:
    """The plan when the device has no room for what the declared optimizer remembers; None where that cannot move."""
    if plan.model != "decoder" or not plan.device.startswith("cuda") or plan.optimizer == "host":
        return None
    return _changed(plan, "optimizer", "host", "its state on the device") if movable(optimizer) else None


def _changed(plan: Plan, name: str, value: Any, before: str) -> Plan:
    """``plan`` with another value, whose reason is that the one before was too much."""
    reasons = {**plan.reasons, name: f"memory ran out with {before}"}
    return replace(plan, **{name: value}, reasons=reasons)


def _hardware(machine: Mapping[str, Any]) -> str:
    """What a plan depends on of a machine, in words: the accelerators and their memory, else the processor."""
    gpus = machine.get("gpus") or ()
    if gpus:
        return ", ".join(f"{gpu['name']} {gpu['memory'] / 2**30:.0f} GiB" for gpu in gpus)
    return f"{machine.get('cpu') or 'CPU'}, {machine.get('cores')} cores, {machine.get('memory', 0) / 2**30:.0f} GiB"
