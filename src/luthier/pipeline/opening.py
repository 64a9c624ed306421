"""Weights are opened here and nowhere else: the one place that chooses which kind of `Tunable` runs a config."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.config import Config
from luthier.run import RunFolder
from luthier.types import Base, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.model.tunable import Tunable
    from luthier.train.precision import Precision


def open_for_tuning(
    settings: Config, base: Base, precision: Precision, plan: Plan, sink: events.Sink, *, steps: int
) -> Tunable:
    """The base with what shall be trained of it: a new adapter, one to go on from, or all weights.

    ``steps``: optimizer steps of the whole run, which adapters with a schedule of their own need to know.
    """
    from luthier.model import adapters
    from luthier.pipeline.generic import Generic

    model = _transformers(settings, base, precision, plan.device, sink, frozen=settings.adapter is not None)
    adapter = settings.adapter
    adapted: Any = model
    if adapter is None:
        model.requires_grad_(True)
    else:
        adapted = adapters.add_adapter(
            model, adapter, settings.random_seed, total_steps=steps, expect_base_hash=base.content_hash
        )
    return Generic(
        adapted,
        base,
        "adapter" if adapter else "weights",
        precision=precision,
        device=plan.device,
        checkpointing=plan.checkpointing,
        neftune_alpha=settings.model_parameters.neftune_noise_alpha,
        seed=settings.random_seed,
    )


def open_tuned(
    settings: Config, base: Base, precision: Precision, device: str, run: RunFolder, sink: events.Sink
) -> Tunable:
    """What a finished run made. Raises AssetError when its files are damaged or belong to another base."""
    from luthier.model import adapters
    from luthier.pipeline.generic import Generic

    if run.weights.is_dir():
        whole = _transformers(settings, replace(base, path=run.weights), precision, device, sink, frozen=False)
        return Generic(whole.eval(), base, "weights", precision=precision, device=device)
    model = _transformers(settings, base, precision, device, sink)
    adapted = adapters.load_adapter(model, run.adapter, expect_base_hash=base.content_hash)
    return Generic(adapted.eval(), base, "adapter", precision=precision, device=device)


def open_base(settings: Config, base: Base, precision: Precision, device: str, sink: events.Sink) -> Tunable:
    """The base as it is."""
    from luthier.pipeline.generic import Generic

    model = _transformers(settings, base, precision, device, sink)
    return Generic(model.eval(), base, "nothing", precision=precision, device=device)


def declared_precision(settings: Config) -> str:
    """Ludwig's `use_mixed_precision: false` is fp32; true and absent leave it to `precision`."""
    return "fp32" if settings.trainer.use_mixed_precision is False else settings.trainer.precision


def _transformers(
    settings: Config, base: Base, precision: Precision, device: str, sink: events.Sink, *, frozen: bool = True
) -> PreTrainedModel:
    from luthier.model.load import load_base

    return load_base(
        base,
        quantization=settings.quantization,
        # Weights that are trained stay in fp32 and are computed with under autocast; frozen ones are held as used.
        dtype=precision if frozen else "fp32",
        device=device,
        model_parameters=settings.model_parameters,
        sink=sink,
    )
