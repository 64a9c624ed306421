"""Why a plan is as it is: one line for each choice."""

from __future__ import annotations

from typing import Any, Literal

from luthier.plan.job import Job
from luthier.plan.passes import EAGER, GRAPHED, passes_of
from luthier.plan.pins import declared_recompute
from luthier.plan.support import Engine, flash, not_decoder
from luthier.types import Machine, ModelSpec, Plan

Bound = Literal["memory", "time", "gain"]  # what keeps passes from being larger

SET = "set in execution:"
STEPS = 64  # that stand for all of them
LEANEST = "of all plans this lacks least; none fits"
SIZED = ("tokens_per_pass", "recompute_layers", "weights", "offload_checkpoints", "mlp_tile", "embeddings", "optimizer",
         "graphs")  # fmt: skip


def why(
    config: Any,
    job: Job,
    plan: Plan,
    machine: Machine,
    engine: Engine,
    spec: ModelSpec,
    *,
    fits: bool = True,
    bound: Bound = "memory",
) -> dict[str, str]:
    """Field of the plan -> its reason.

    ``fits``: whether it does; else what memory decided has that for a reason. ``bound``: why passes are no larger.
    """
    pinned = config.execution.pins
    layers = spec.layers
    gpu = machine.gpus[int(plan.device.partition(":")[2] or 0)] if plan.device != "cpu" else None
    no_flash = flash(machine, plan.device, job.compute)
    said = {
        "device": gpu.name if gpu else "no GPU was found" if not machine.gpus else SET,
        "model": not_decoder(config, spec, engine) or "the decoder of this architecture packs rows without padding",
        "tokens_per_pass": _tokens(job, plan, bound),
        "attention": "rows are packed and never see each other" if plan.attention == "flash" else
        "the generic path pads rows" if plan.model == "generic" else str(no_flash),
        "recompute_layers": _recompute(config, job, plan, layers),
        "weights": _weights(job, plan),
    }  # fmt: skip
    if plan.model == "decoder":
        said["loss_chunk"] = f"logits of {job.shape.spec.vocab:,} words exist for so many tokens at a time"
    if plan.offload_checkpoints:
        said["offload_checkpoints"] = "their inputs would not fit beside the rest"
    if plan.mlp_tile:
        said["mlp_tile"] = "what a feed-forward layer needs for all tokens at once would not fit"
    if plan.embeddings == "host":
        said["embeddings"] = "the table is looked up on the host to make room"
    if plan.optimizer == "host":
        said["optimizer"] = "its state does not fit on the device"
    if plan.graphs:
        said["graphs"] = "starting kernels one by one would take longer than making the graphs"
    if plan.model == "decoder" and not plan.share_prefix:
        said["pad_to_multiple_of"] = _padding(plan)
    if plan.share_prefix:
        said["share_prefix"] = _shared(job, plan)
    if not fits:
        forced = {"weights": job.trained.full, "recompute_layers": declared_recompute(config, layers) is not None}
        said |= {name: LEANEST for name in SIZED if name in said and not forced.get(name)}
    names = {"recompute_layers": "recompute"}
    declared = {field: SET for field in said if names.get(field, field) in pinned}
    if "share_prefix" in declared:  # it may be in vain
        declared["share_prefix"] += f" {said['share_prefix']}"
    return said | declared


def _tokens(job: Job, plan: Plan, bound: Bound) -> str:
    most = job.most(plan.model, plan.share_prefix)
    if plan.tokens_per_pass >= most:
        return f"a whole step of {job.batch} rows fits in one pass"
    if plan.device == "cpu":
        return "larger passes leave the CPU's cache, smaller ones read the weights more often"
    step = f"a step of {job.batch} rows has up to {most:,} tokens"
    if bound == "gain":
        return f"more tokens in one pass would gain nothing; {step}"
    if bound == "time":
        return f"larger passes would fit, and are predicted to take no less time; {step}"
    return f"a larger pass does not fit beside the rest of this plan; {step}"


def _shared(job: Job, plan: Plan) -> str:
    if not job.beginnings:
        if not job.seen:
            return "whether rows start alike is not known here, and nothing is counted as shared"
        return "not all rows start alike: only some of a pass may, and nothing is counted as shared"
    sizes = [tokens for _, tokens in job.beginnings]
    if job.beginnings == ((1.0, job.shared),):
        said = f"all rows start with the same {job.shared:,} tokens"
    elif len(sizes) == 1:
        said = f"{_share(job)} of the rows start with the same {sizes[0]:,} tokens"
    else:
        said = (
            f"{_share(job)} of the rows have one of {len(sizes)} beginnings of {min(sizes):,} to {max(sizes):,} tokens"
        )
    passes = [
        rows for step in job.steps[:STEPS] for rows in passes_of(step, plan.tokens_per_pass, "decoder", job.shared)
    ]
    tokens = sum(map(sum, passes))
    saved = tokens - sum(job.computed(rows, "decoder", True) for rows in passes)
    steps = max(len(job.steps[:STEPS]), 1)
    return f"{said}, so that about {saved / steps:,.0f} of the {tokens / steps:,.0f} tokens of a step need no computing"


def _share(job: Job) -> str:
    return f"{100 * sum(part for part, _ in job.beginnings):.0f} %"


def _padding(plan: Plan) -> str:
    if not plan.device.startswith("cuda"):
        return "what rows are padded to inside the attention"
    coarse = plan.pad_to_multiple_of == max(GRAPHED if plan.graphs else EAGER)
    once = "graphs to make" if plan.graphs else "shapes to tune products for"
    return f"a run this short gains more from fewer {once}" if coarse else f"less padding is worth more {once}"


def _recompute(config: Any, job: Job, plan: Plan, layers: int) -> str:
    if config.trainer.enable_gradient_checkpointing is True:
        return "trainer.enable_gradient_checkpointing is set"
    if config.trainer.enable_gradient_checkpointing is False:
        return "trainer.enable_gradient_checkpointing is false"
    if config.execution.offload_checkpoints is True and plan.offload_checkpoints:
        return "execution.offload_checkpoints is set: all layers keep their input alone, and that on the host"
    if not plan.recompute_layers:
        return "all activations fit in memory"
    count = min(plan.recompute_layers, layers)
    return f"activations of {count} of {layers} layers would not fit; {100 * count / layers / 3:.0f} % more arithmetic"


def _weights(job: Job, plan: Plan) -> str:
    if job.trained.full:
        return "all weights are trained"
    if plan.weights == "resident":
        return "de-quantised once, since memory has room" if job.bits else "they fit on the device as they are"
    if plan.weights == "quantised":
        how = "by bitsandbytes" if plan.model == "generic" else "as they are used"
        return f"{job.bits} bits: de-quantised {how}"
    return "they do not fit on the device beside the rest"
