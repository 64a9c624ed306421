"""Where PEFT would refuse what a config says, or go on with something else: put in its words, or refused here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from luthier.assets.adapter_files import no_butterflies

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NUMBER = re.compile(r"\.(\d+)\.")  # of a layer, in the name of its module


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
