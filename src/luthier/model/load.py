"""A base model's files become a transformers model in memory, in 16, 8 or 4 bits. Only safetensors are read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from luthier import events
from luthier.errors import AssetError, missing_extra
from luthier.types import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a library raises for a config whose values are not of the kind that it expects.
MISREAD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_base(
    base: Base,
    *,
    quantization: Any = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    model_parameters: Any = None,
    sink: events.Sink = events.silent,
) -> PreTrainedModel:
    """The frozen model on ``device``, in evaluation mode.

    ``dtype`` is a torch type or a precision's name (bf16, fp16, fp32). Weights that are to be trained themselves
    want fp32: updates smaller than bf16's resolution would be lost. ``quantization`` and ``model_parameters`` are the
    config's sections of those names, or None.
    Raises AssetError asset-damaged when weights are missing or of another shape, asset-unsupported for an
    architecture that transformers does not know; DependencyError without bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    trust = base.remote_code  # a Base with remote code exists only because the caller trusted it
    with events.stage(sink, "load", base.name), _quiet():
        try:
            config = AutoConfig.from_pretrained(base.path, trust_remote_code=trust)
            _stretch_positions(config, model_parameters)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                quantization_config=_bitsandbytes(quantization, dtype),
                device_map={"": device} if quantization is not None else None,
                trust_remote_code=trust,
                output_loading_info=True,
            )
        except MISREAD as error:
            raise unreadable(base, "transformers", error) from error
        except (OSError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _damaged(base, str(error).splitlines()[0]) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise _damaged(base, f"{len(missing)} weights are missing, such as {missing[0]}")
    if quantization is None:
        model.to(device)
    elif quantization.bits == 4:
        _keep_gradients(model)
    elif dtype != torch.float16:
        sink(events.Note(text="in 8 bits inputs are multiplied in float16, whatever the precision"))
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says so of every product
    model.requires_grad_(False)
    model.config.use_cache = False
    ready: PreTrainedModel = model.eval()
    return ready


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter's file. Raises AssetError asset-damaged when it is no whole safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(
            "asset-damaged",
            f"the adapter's weights cannot be read: {error}",
            where=str(path),
            received=path.name,
            allowed="a whole .safetensors file",
            fix="restore the file; `luthier runs verify RUN` names what is damaged",
        ) from error


def unreadable(base: Base, who: str, error: Exception) -> AssetError:
    """The error for a base whose config ``who`` cannot make a model of."""
    why = next(iter(str(error).splitlines()), "") or "no reason given"
    return AssetError(
        "asset-unsupported",
        f"{who} cannot load this base model: {why}"
        + ("" if isinstance(error, ValueError) else f" ({type(error).__name__})"),
        where=str(base.path),
        received=base.spec.architecture,
        allowed="a causal language model of an architecture that the installed transformers has",
        fix="choose another base (`luthier init` proposes some), or upgrade transformers",
    )


def _keep_gradients(model: Any) -> None:
    """Have bitsandbytes keep its 4-bit weights as they are.

    On CPUs with bf16 instructions the first forward without gradient repacks them for a kernel that has no backward:
    whatever is trained after an evaluation would get no gradient through those layers, with no more than a warning.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _damaged(base: Base, why: str) -> AssetError:
    return AssetError(
        "asset-damaged",
        f"the base model's files are incomplete: {why}",
        where=str(base.path),
        received=base.name,
        fix="get the model again",
    )


def _stretch_positions(config: Any, parameters: Any) -> None:
    """Apply ``model_parameters.rope_scaling`` to the model's config."""
    scaling = getattr(parameters, "rope_scaling", None)
    if scaling is None:
        return
    current = getattr(config, "rope_parameters", None)
    if not isinstance(current, dict) or "rope_type" not in current:
        raise AssetError(
            "asset-unsupported",
            f"rope_scaling cannot be applied to the architecture {config.model_type}",
            where="model_parameters.rope_scaling",
            received=scaling.rope_type,
            allowed="a base with one kind of rotary positions",
            fix="remove rope_scaling, or choose a base with one kind of rotary positions",
        )
    config.rope_parameters = {**current, "rope_type": scaling.rope_type, "factor": float(scaling.factor)}


def _bitsandbytes(quantization: Any, dtype: torch.dtype) -> Any:
    """The quantization section as transformers takes it, or None."""
    if quantization is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise missing_extra("bitsandbytes", "bnb", "a base in 4 or 8 bits") from error
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=quantization.llm_int8_threshold,
            llm_int8_has_fp16_weight=quantization.llm_int8_has_fp16_weight,
        )
    wanted = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if wanted == "auto" else getattr(torch, wanted),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress is told through events, not through transformers' own bars and reports."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
