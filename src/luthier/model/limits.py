"""Where PEFT would refuse what a config says, or go on with something else: put in its words, or refused here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from luthier import events
from luthier.assets.adapter_files import no_butterflies
from luthier.errors import AssetError
from luthier.model import starts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Kernels of a state space read these weights themselves, past an adapter; PEFT refuses low-rank pairs there.
STATE_SPACES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
PAST_ADAPTERS = ("out_proj", "conv1d")
NUMBER = re.compile(r"\.(\d+)\.")  # of a layer, in the name of its module


def left_out(section: Any, model: PreTrainedModel, sink: events.Sink) -> Any:
    """The section without the modules that PEFT cannot adapt, where all linear layers are meant; the sink is told."""
    if section.type not in ("lora", "adalora") or section.target_modules not in (None, "all-linear"):
        return section
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    names = tuple(name for name in PAST_ADAPTERS if name in there)
    if not names or model.config.model_type not in STATE_SPACES:
        return section
    sink(
        events.Note(text=f"no adapter at {' and '.join(names)}: {model.config.model_type} reads their weights past it")
    )
    excluded = section.exclude_modules
    if isinstance(excluded, str):
        excluded = rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(names)})"
    else:
        excluded = (*(excluded or ()), *names)
    return section.model_copy(update={"exclude_modules": excluded})


def linear_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The last parts of the names of linear layers that an adapter can stand at, each once."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    past = PAST_ADAPTERS if model.config.model_type in STATE_SPACES else ()
    names = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    )
    return tuple(name for name in dict.fromkeys(names) if name not in past)


def does_not_fit(section: Any, model: PreTrainedModel, names: tuple[str, ...], said: str) -> AssetError:
    """The error where PEFT refuses an adapter with what it ``said``; ``names``: of layers that can be adapted."""
    targets = f"adapter.target_modules: [{', '.join(names)}]"
    if starts.kind_of(section) is not None:
        fix = "use adapter.init_lora_weights: default"
    elif "lora_dropout" in said:  # experts are weights of one module, in front of which it cannot drop anything out
        fix = f"adapter.dropout: 0; or {targets}, which leaves the experts out"
    else:
        fix = f"set {targets}, or some of these" + ("" if section.type == "lora" else "; or use adapter.type: lora")
    return AssetError(
        "asset-unsupported",
        f"an adapter of type {section.type} does not fit this base: {said.splitlines()[0]}",
        where="adapter",
        received=model.config.model_type,
        fix=fix,
    )


def by_names(section: Any, model: PreTrainedModel) -> Any:
    """The section with the names of the modules that it means, where it names them by a pattern and numbers of layers.

    PEFT takes numbers beside a list of names alone, and means all linear layers but the head by none.
    """
    numbers, targets = getattr(section, "layers_to_transform", None), section.target_modules
    if numbers is None or isinstance(targets, tuple):
        return section
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    named = [
        name
        for name, module in model.named_modules()
        if (number := NUMBER.search(name))
        and int(number[1]) in numbers
        and (
            isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
            if targets in (None, "all-linear")
            else re.fullmatch(targets, name)
        )
    ]
    if not named:
        raise ValueError(f"no module of layers {', '.join(map(str, numbers))} is meant by target_modules: {targets}")
    return section.model_copy(update={"target_modules": tuple(named), "layers_to_transform": None})


def require_butterflies(tuned: PeftModel, section: Any, device: torch.device) -> None:
    """Raises AssetError where PEFT has left factors of BOFT out, or would end at the first step."""
    if section.type != "boft" or section.boft_n_butterfly_factor == 1:
        return
    if device.type != "cuda":
        raise no_butterflies(section.boft_n_butterfly_factor, f"the model is on the {device.type}")
    built = (module.fbd_cuda_available for module in tuned.modules() if hasattr(module, "fbd_cuda_available"))
    if not all(built):
        raise no_butterflies(section.boft_n_butterfly_factor, "it could not be compiled here")
