"""Pins of the `execution:` section that cannot work are refused, each with its reason, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.errors import ConfigError, Fault
from luthier.plan.job import Job
from luthier.plan.precision import declared_precision
from luthier.plan.support import Engine, no_graphs
from luthier.types import Machine

DECODER_ONLY = ("offload_checkpoints", "mlp_tile", "embeddings", "optimizer", "loss_chunk", "graphs",
                "pad_to_multiple_of", "share_prefix")  # fmt: skip
Refuse = Callable[..., None]  # key of `execution`, why, and what to write instead of "auto"
PLAIN = (False, 0, "device", "auto")  # what these are anyway


def check(
    config: Any,
    job: Job,
    machine: Machine,
    device: str,
    model: str,
    why_not: str | None,
    no_flash: str | None,
    engine: Engine,
) -> None:
    """Raises ConfigError with a fault for each pin that cannot work here."""
    pinned, layers = config.execution, job.shape.spec.layers
    faults: list[Fault] = []

    def refuse(key: str, why: str, fix: str = "auto") -> None:
        value = getattr(pinned, key)
        faults.append(
            Fault("config-conflict", f"`execution.{key}: {_yaml(value)}` cannot work: {why}", f"execution.{key}", value,
                  "auto, or what this machine, base and data can do", f"execution.{key}: {fix}")
        )  # fmt: skip

    if why := _no_bf16(config, job, machine, device):
        allowed, fix = ("auto", "fp16", "fp32"), "trainer.precision: auto"
        faults.append(Fault("config-conflict", why, "trainer.precision", "bf16", allowed, fix))
    if pinned.model == "decoder" and why_not:
        refuse("model", why_not)
    if pinned.device in ("cuda", "mps") and not device.startswith(pinned.device):
        refuse("device", f"no {pinned.device} device was found; the machine has {_gpus(machine)}")
    if pinned.attention == "flash" and (no_flash or model == "generic"):
        refuse("attention", no_flash or "the generic path pads")
    if isinstance(pinned.tokens_per_pass, int) and pinned.tokens_per_pass < job.longest:
        refuse("tokens_per_pass", f"the longest row has {job.longest:,} tokens, and a row is never cut in two",
               f"{job.longest} (or lower preprocessing.max_sequence_length)")  # fmt: skip
    if isinstance(pinned.recompute, int):
        if pinned.recompute > layers:
            refuse("recompute", f"the model has {layers} layers", "all")
        elif model == "generic" and pinned.recompute not in (0, layers):
            refuse("recompute", "the generic path recomputes all layers or none", "all")
    if config.trainer.enable_gradient_checkpointing is True and pinned.recompute not in ("auto", "all", layers):
        refuse("recompute", "trainer.enable_gradient_checkpointing is true, which recomputes all layers", "all")
    if config.trainer.enable_gradient_checkpointing is False and pinned.recompute not in ("auto", "none", 0):
        refuse("recompute", "trainer.enable_gradient_checkpointing is false, which recomputes no layer", "none")
    if model == "generic":
        for key in DECODER_ONLY:
            if getattr(pinned, key) not in PLAIN:
                refuse(key, f"it belongs to Luthier's own decoder, and {why_not or 'execution.model is generic'}")
    _check_weights(config, job, device, model, engine, refuse)
    for key, there in (("embeddings", engine.embeddings_on_host), ("optimizer", engine.optimizer_on_host)):
        if model == "decoder" and getattr(pinned, key) == "host" and not (there and device.startswith("cuda")):
            refuse(key, "there is no device memory to spare on a CPU" if there else "the engine does not do it yet")
    if model == "decoder" and device.startswith("cuda") and pinned.embeddings == "host" and not job.shape.head:
        refuse("embeddings", "the base's output head is the same table, which stays on the device for it: the host "
               "would hold a copy, and no memory would be saved", "device")  # fmt: skip
    if model == "decoder":
        _check_decoder(config, job, device, no_flash, engine, refuse)
    if faults:
        raise ConfigError(faults)


def declared_recompute(config: Any, layers: int) -> int | None:
    """Layers that are recomputed whatever memory there is; None where that is left to the plan."""
    if config.trainer.enable_gradient_checkpointing is True:
        return layers
    if config.trainer.enable_gradient_checkpointing is False:
        return 0
    declared = config.execution.recompute
    if declared == "auto":
        return layers if config.execution.offload_checkpoints is True else None  # there shall be something to move
    named: int = {"none": 0, "all": layers}.get(declared, declared)
    return min(named, layers)


def _check_decoder(config: Any, job: Job, device: str, no_flash: str | None, engine: Engine, refuse: Refuse) -> None:
    """What only Luthier's own decoder does: state and checkpoints on the host, graphs, shared prefixes."""
    pinned = config.execution
    if pinned.optimizer == "host" and device.startswith("cuda") and not job.movable:
        refuse("optimizer", f"{config.trainer.optimizer.type} has no state, or pages or packs it by itself", "device")
    if pinned.offload_checkpoints is True:
        if not (engine.offload_checkpoints and device.startswith("cuda")):
            refuse("offload_checkpoints", "it needs a CUDA GPU" if engine.offload_checkpoints else "not built yet")
        elif declared_recompute(config, job.shape.spec.layers) == 0:
            refuse("offload_checkpoints", "without recomputed layers there are no checkpoints", "false")
    if pinned.graphs is True:
        packs = "padded" if no_flash or pinned.attention == "padded" else "flash"
        if why := no_graphs(packs, device, job.trained.full) or (None if engine.graphs else "not built yet"):
            refuse("graphs", why, "false")
        elif pinned.recompute not in ("auto", "none", 0) or config.trainer.enable_gradient_checkpointing is True:
            refuse("graphs", "graphs recompute nothing, and recomputing is asked for", "false")
        elif pinned.offload_checkpoints is True:
            refuse("graphs", "graphs recompute nothing, so there are no checkpoints to offload", "false")
        elif pinned.mlp_tile not in ("auto", 0):
            refuse("graphs", "graphs recompute nothing, and mlp_tile recomputes the feed-forward layers", "false")
    if pinned.share_prefix is True:
        if job.dropout:
            refuse("share_prefix", f"adapter.dropout is {job.dropout:g}, and shared tokens have one mask", "false")
        elif not engine.share_prefix:
            refuse("share_prefix", "the engine does not do it yet", "false")
        elif pinned.graphs is True:
            refuse("share_prefix", "a graph's keys are its tokens in their order, and graphs is true", "false")


def _check_weights(config: Any, job: Job, device: str, model: str, engine: Engine, refuse: Refuse) -> None:
    pinned = config.execution.weights
    if pinned == "auto":
        return
    if job.trained.full and pinned != "resident":
        refuse("weights", "all weights are trained, so they stay on the device", "resident")
    elif pinned == "quantised" and job.bits is None:
        refuse("weights", "the base is not quantised, and quantising it would change what is learned; "
               "set quantization.bits: 4 for that", "resident")  # fmt: skip
    elif model == "generic" and pinned != ("quantised" if job.bits else "resident"):
        refuse("weights", "the generic path keeps weights as bitsandbytes and transformers load them")
    elif pinned == "streamed" and not device.startswith("cuda"):
        refuse("weights", "streaming copies from the host to a CUDA GPU", "resident")
    elif model == "decoder" and pinned not in engine.weights:
        refuse("weights", "the engine does not do it yet")


def _no_bf16(config: Any, job: Job, machine: Machine, device: str) -> str | None:
    """Why a declared bf16 cannot be computed in; None where it can, or was not declared."""
    if not device.startswith("cuda") or job.precision != "bf16" or declared_precision(config) != "bf16":
        return None
    gpu = machine.gpus[int(device.partition(":")[2] or 0)]
    if gpu.capability is None or gpu.capability >= (8, 0):
        return None
    return f"bf16 arithmetic needs compute capability 8.0; {gpu.name} has {'.'.join(map(str, gpu.capability))}"


def _gpus(machine: Machine) -> str:
    return ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
