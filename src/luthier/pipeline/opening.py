"""Weights are opened here and nowhere else: the one place that chooses which kind of `Tunable` runs a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.assets.cache import cache_root
from luthier.assets.spec import read_json
from luthier.config import Config
from luthier.errors import AssetError, ConfigError
from luthier.parallel.place import place
from luthier.plan import machine as machines
from luthier.plan.slots import fits_spread
from luthier.plan.support import BUILT, not_decoder, refusal_of
from luthier.run import RunFolder
from luthier.types import Base, Example, Plan

if TYPE_CHECKING:
    from threading import Thread

    from transformers import PreTrainedModel

    from luthier.model.decoder.decoder import Decoder
    from luthier.model.decoder.kept import Keeping
    from luthier.model.decoder.load import Placing
    from luthier.model.decoder.shape import Shape
    from luthier.model.tunable import Tunable
    from luthier.train.precision import Precision


# oneDNN keeps what it compiled for every shape it has met, a thousand of them, and each length of a pass is a few dozen
# new ones: 1.3 GiB after 75 steps of the demo. So many hold those of the last lengths, and the run is no slower. The
# variables are read when the first product is made.
KEPT = 100
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's own, and the library's

KEEP = "LUTHIER_KEEP_QUANTISED"  # 0: a base in 4 bits is neither kept in the cache nor read from it

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # with which the environment sets torch's memory itself


def open_for_tuning(
    settings: Config,
    base: Base,
    precision: Precision,
    plan: Plan,
    sink: events.Sink,
    *,
    steps: int,
    layers: int | None = None,
    rows: Sequence[Example] = (),
    kept: Path | None = None,
) -> Tunable:
    """The base with what shall be trained of it: a new adapter, one to go on from, or all weights.

    ``steps``: optimizer steps of the whole run, which adapters with a schedule of their own need to know.
    ``layers``: as if the base had its first ones alone, of the decoder's.
    ``rows``: training rows that an adapter's start looks at; ``kept``: the file where such a start is kept.
    """
    _prepare(plan.device)
    adapter = settings.adapter
    if plan.model == "decoder":
        from luthier.pipeline.decoded import Decoded

        decoder = _decoder(settings, base, precision, plan, sink, trained=adapter is None, layers=layers)
        if adapter is not None:
            _adapt(decoder, settings)
        tunable = Decoded(decoder, base, "adapter" if adapter else "weights", adapter=adapter)
        tunable.adopt(plan)
        return tunable
    from luthier.model import adapters, starts
    from luthier.pipeline.generic import Generic

    model = _transformers(settings, base, precision, plan.device, sink, frozen=adapter is not None)
    adapted: Any = model
    if adapter is None:
        model.requires_grad_(True)
    else:
        made = starts.kind_of(adapter) is not None
        with events.stage(sink, "start", adapter.init_lora_weights) if made else nullcontext():  # type: ignore[union-attr]
            adapted = adapters.add_adapter(
                model, adapter, settings.random_seed,
                total_steps=steps, expect_base_hash=base.content_hash, rows=rows, kept=kept, sink=sink,
            )  # fmt: skip
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

    if settings.generation.engine == "vllm":
        return _handed_over(settings, base, precision, run)
    _prepare(device)
    whole = run.weights.is_dir()
    files = replace(base, path=run.weights, content_hash="") if whole else base
    if _by_decoder(settings, base):
        from luthier.model.decoder.save import load_adapter
        from luthier.pipeline.decoded import Decoded

        generic = settings.generation.engine == "transformers"
        decoder = _decoder(settings, files, precision, _asking(settings, files, precision, device), sink)
        if whole:
            return Decoded(decoder, base, "weights", generic=generic)
        adapters.check_base(run.adapter, base.content_hash)
        _adapt(decoder, settings)
        load_adapter(decoder, run.adapter)
        return Decoded(decoder, base, "adapter", adapter=settings.adapter, generic=generic)
    model = _transformers(settings, files, precision, device, sink, frozen=not whole)
    if whole:
        return Generic(model.eval(), base, "weights", precision=precision, device=device)
    adapted = adapters.load_adapter(model, run.adapter, expect_base_hash=base.content_hash)
    return Generic(adapted.eval(), base, "adapter", precision=precision, device=device)


def open_base(settings: Config, base: Base, precision: Precision, device: str, sink: events.Sink) -> Tunable:
    """The base as it is."""
    _prepare(device)
    if settings.generation.engine == "vllm":
        return _handed_over(settings, base, precision, None)
    if _by_decoder(settings, base):
        from luthier.pipeline.decoded import Decoded

        plan = _asking(settings, base, precision, device)
        generic = settings.generation.engine == "transformers"
        return Decoded(_decoder(settings, base, precision, plan, sink), base, "nothing", generic=generic)
    from luthier.pipeline.generic import Generic

    model = _transformers(settings, base, precision, device, sink)
    return Generic(model.eval(), base, "nothing", precision=precision, device=device)


def _prepare(device: str) -> None:
    """Set what torch's libraries keep and choose on a device, before they are first asked."""
    if device == "cpu":
        for name in CACHES:
            os.environ.setdefault(name, str(KEPT))
    elif device.startswith("cuda"):
        import torch

        # For rows padded to a length that it has not met, cuDNN's attention compiles a plan: 130 ms on an H100, and
        # nearly every step has a new length. The other kernels take any.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Passes of many sizes leave holes in memory that no later one fits into; pages can be mapped anew.
        if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _by_decoder(settings: Config, base: Base) -> bool:
    """Whether the decoder answers. Raises ConfigError where `generation.engine` demands it in vain."""
    if decodes(settings, base):
        return True
    if settings.generation.engine == "luthier":
        why = refusal_of(read_json(base.path / "config.json")) or "its adapter or execution.model is not the decoder's"
        raise ConfigError(
            "config-conflict", f"Luthier's own engine does not know this model: {why}", where="generation.engine",
            received="luthier", allowed="a base and an adapter of its decoder", fix="set generation.engine: auto",
        )  # fmt: skip
    return False


def _handed_over(settings: Config, base: Base, precision: Precision, run: RunFolder | None) -> Tunable:
    from luthier.model import adapters
    from luthier.pipeline.handed import hand_over

    if run is not None and not run.weights.is_dir():
        adapters.check_base(run.adapter, base.content_hash)
    return hand_over(settings, base, precision, run)


def declared_precision(settings: Config) -> str:
    """Ludwig's `use_mixed_precision: false` is fp32; true and absent leave it to `precision`."""
    return "fp32" if settings.trainer.use_mixed_precision is False else settings.trainer.precision


def decodes(settings: Config, base: Base) -> bool:
    """Whether the decoder runs this config, as the planner decides it for training."""
    if settings.execution.model == "generic":
        return False
    engine = replace(BUILT, refusal=refusal_of(read_json(base.path / "config.json")))
    return not_decoder(settings, base.spec, engine) is None


def _decoder(
    settings: Config,
    base: Base,
    precision: Precision,
    plan: Plan,
    sink: events.Sink,
    *,
    trained: bool = False,
    layers: int | None = None,
) -> Decoder:
    """The decoder with its weights where the plan wants them. Raises AssetError."""
    from luthier.model.decoder.load import Placing, load_decoder
    from luthier.model.decoder.shape import Unsupported, read_shape
    from luthier.model.load import DTYPES, MISREAD, unreadable

    quantization = settings.quantization
    how = Placing(
        dtype=DTYPES[precision],
        device=plan.device,
        quantised=quantization.bnb_4bit_quant_type if quantization else None,
        double=quantization.bnb_4bit_use_double_quant if quantization else True,
        weights=plan.weights,
        embeddings=plan.embeddings,
        trained=trained,
    )
    try:
        shape = read_shape(base.path, settings.model_parameters.rope_scaling)
    except Unsupported as error:
        raise AssetError(
            "asset-unsupported",
            f"Luthier's own decoder cannot run this base: {error}",
            where=str(base.path),
            received=base.spec.architecture,
            allowed="execution.model: auto or generic",
            fix="set execution.model: generic",
        ) from error
    except MISREAD as error:
        raise unreadable(base, "Luthier's own decoder", error) from error
    if layers is not None:
        shape = replace(shape, layers=layers, rotary=shape.rotary[:layers], window=shape.window[:layers])
    with events.stage(sink, "load", base.name):
        compiling = _compiling(shape, how)
        try:
            decoder = load_decoder(
                base.path, shape, how,
                told=lambda done, all_: sink(events.Progress(stage="load", completed=done, total=all_, unit="layers")),
                keeping=_keeping(base, sink, writes=layers is None),
            )  # fmt: skip
        except MISREAD as error:
            raise unreadable(base, "Luthier's own decoder", error) from error
        if compiling is not None:
            compiling.join()
        return decoder


def _keeping(base: Base, sink: events.Sink, *, writes: bool) -> Keeping | None:
    """Where the base in 4 bits is kept; None for weights of a run's own, and where the environment forbids it."""
    from luthier.model.decoder.kept import Keeping

    if not base.content_hash or os.environ.get(KEEP) == "0":
        return None
    first = place().first
    return Keeping(cache_root(), base.content_hash, writes and first, lambda text: sink(events.Note(text=text)))


def _compiling(shape: Shape, how: Placing) -> Thread | None:
    """Compile the kernels beside the loading, where they are compiled."""
    from luthier.kernels.backend import has_triton

    if not how.device.startswith("cuda") or not has_triton():
        return None
    from luthier.kernels.gpu.warm import warm

    return warm(
        device=how.device,
        dtype=how.dtype,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotated=2 * len(shape.rotary[0].inverse),
        vocab=shape.vocab,
        activation=shape.activation,
        windows=shape.window,
        offset=shape.norm_offset,
        packed=how.quantised is not None and how.double,
    )


def _adapt(decoder: Decoder, settings: Config) -> None:
    try:
        decoder.adapt(settings.adapter, settings.random_seed)
    except ValueError as error:
        raise AssetError(
            "asset-unsupported",
            f"an adapter of type lora does not fit this base: {error}",
            where="adapter",
            received=str(error),
            allowed="names of linear layers of this base",
            fix="set adapter.target_modules to names of its linear layers, or leave it out for all of them",
        ) from error


def _asking(settings: Config, base: Base, precision: Precision, device: str) -> Plan:
    """How a model that is only asked lies: a base in 4 bits stays so where its de-quantised weights would not fit."""
    import torch

    flash = device.startswith("cuda") and precision != "fp32" and torch.cuda.get_device_capability(device) >= (8, 0)
    wanted = settings.execution.weights
    if wanted == "auto":
        machine = machines.probe(settings.execution.device)
        free = machine.free_memory if device == "cpu" else max(gpu.free for gpu in machine.gpus)
        fits = fits_spread(base.spec.parameters, 4 if precision == "fp32" else 2, free)
        wanted = "resident" if settings.quantization is None or fits else "quantised"
    return Plan(device, 0, "decoder", "flash" if flash else "padded", weights=wanted)


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
