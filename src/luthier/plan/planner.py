"""How a config is executed on a machine: a pure function of config, model, data and machine, with a reason each."""

from __future__ import annotations

from typing import Any

from luthier.types import DataStats, Gpu, Machine, ModelSpec, Plan

CPU_TOKENS = 512  # padded tokens of a pass: enough to fill a CPU's matrix units, small enough to stay in cache
MAX_TOKENS = 16384  # more in one pass gains nothing
RESERVE = 0.85  # share of free memory that is planned for; the rest is fragmentation and what else runs


def device_of(machine: Machine) -> str:
    """The device a run uses: the GPU with the most free memory, else the CPU."""
    if not machine.gpus:
        return "cpu"
    best = max(range(len(machine.gpus)), key=lambda index: machine.gpus[index].free)
    return "mps" if machine.gpus[best].kind == "mps" else f"cuda:{best}"


def make_plan(config: Any, spec: ModelSpec, stats: DataStats, machine: Machine) -> Plan:
    """The plan. It changes time and memory, never the gradient; one example always fits into a pass."""
    device = device_of(machine)
    gpu = max(machine.gpus, key=lambda one: one.free, default=None)
    room = RESERVE * (gpu.free if gpu else machine.free_memory) - fixed_bytes(config, spec, gpu)
    declared = config.trainer.enable_gradient_checkpointing is True  # "auto" leaves it to memory
    full = max(room, 0) / token_bytes(spec, checkpointing=False)
    need = max(stats.longest, 1)
    checkpointing = declared or full < need
    fitting = max(room, 0) / token_bytes(spec, checkpointing=True) if checkpointing else full
    wanted = CPU_TOKENS if device == "cpu" else MAX_TOKENS
    tokens = max(need, int(min(wanted, fitting)))
    where = gpu.name if gpu else "no GPU was found"
    why_tokens = f"memory has room for about {int(fitting):,} tokens a pass"
    if need >= tokens:
        why_tokens = f"the longest example has {need:,} tokens"
    elif tokens == wanted:
        why_tokens = "more in one pass would not be faster here"
    if fitting < need:
        why_tokens += f"; memory is estimated for {int(fitting):,}, so it may run out"
    why_checkpointing = "enable_gradient_checkpointing is set" if declared else "activations fit in memory"
    if checkpointing and not declared:
        why_checkpointing = "activations of the longest example would not fit in memory"
    reasons = {"device": where, "tokens_per_pass": why_tokens, "recompute_layers": why_checkpointing}
    return Plan(device, tokens, recompute_layers=spec.layers if checkpointing else 0, reasons=reasons)


def fixed_bytes(config: Any, spec: ModelSpec, gpu: Gpu | None = None) -> float:
    """Bytes that do not grow with the pass: weights; for full training also masters, gradients, two moments."""
    bits = config.quantization.bits if config.quantization is not None else None
    frozen = {4: 0.6, 8: 1.1, None: 2.0}[bits]
    full = config.adapter is None
    return spec.parameters * (16.0 if full else frozen + 0.02 * 16) + (2**30 if gpu and gpu.kind == "cuda" else 0)


def token_bytes(spec: ModelSpec, *, checkpointing: bool) -> float:
    """Bytes of activations for one token: per layer its inputs and inner products, and the head's logits in fp32."""
    inner = 0 if checkpointing else 2 * (10 * spec.hidden + 4 * spec.intermediate)
    return spec.layers * (2 * spec.hidden + inner) + 12 * spec.vocab + 2 * (10 * spec.hidden + 4 * spec.intermediate)
