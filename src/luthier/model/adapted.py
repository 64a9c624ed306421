"""An adapter on its base: put on, and switched off again so that the base is what it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

REMARKS = (
    "`is_gradient_checkpointing`", "The PEFT config's", "Unsupported layer type", "Failed to load the CUDA",
    "Setting boft_n_butterfly", "Could not find a config file", "Careful, disabling adapter layers with bias",
    "Model has `tie_word_embeddings=True`", "Model with `tie_word_embeddings=True`",
    # Keys that PEFT itself adds for experts, where none of them is meant; a key of the user's beside them is told.
    r"The following (rank|alpha)_pattern keys did not match any .* ignored: \['\.\*\\\\\.gate_up_proj'\]",
)  # fmt: skip
BIASES = "_biases_of_base"  # the attribute of a PEFT model that holds them


def put_on(model: Any, config: PeftConfig) -> PeftModel:
    """``model`` with a new adapter, which is as `config` starts it. Biases that it trains in place are remembered."""
    import peft

    named = model.named_parameters() if getattr(config, "bias", "none") != "none" else ()
    own = {name: weight.detach().clone() for name, weight in named if name.endswith(".bias")}
    tuned: PeftModel = peft.get_peft_model(model, config)
    setattr(tuned, BIASES, own)
    return tuned


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The base alone while it is open: PEFT switches off what it added, and leaves the biases as they were trained."""
    own: Mapping[str, torch.Tensor] = getattr(model, BIASES, {})
    with without_remarks(), model.disable_adapter():
        weights = {
            name.replace(".base_layer.", "."): weight for name, weight in model.base_model.model.named_parameters()
        }
        trained = {name: weights[name].detach().clone() for name in own}
        _copy(weights, own)
        try:
            yield
        finally:
            _copy(weights, trained)


def _copy(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """PEFT remarks on its own use of transformers, on missing compilers and on paths; none is the user's doing."""
    with warnings.catch_warnings():
        for start in REMARKS:
            warnings.filterwarnings("ignore", message=start)
        yield
