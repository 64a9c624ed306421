"""What PEFT refuses, or leaves out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier import config
from luthier.assets import resolve
from luthier.errors import AssetError
from luthier.model.adapters import add_adapter
from luthier.model.decoder.lora import ranks
from luthier.pipeline import named
from luthier.plan.support import BUILT


def section_of(**adapter: Any) -> Any:
    return config.load({"base_model": "owner/model", "adapter": adapter}).adapter


def made(folder: Path, section: Any) -> Any:
    return add_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), section, 0, total_steps=10)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(
    "targets", [None, "all-linear", r".*\.(q_proj|down_proj)", r".*layers\.[01]\.mlp\..*", ["q_proj"]]
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_of_layers_go_with_every_way_of_naming_modules(tiny_llama: Path, kind: str, targets: Any) -> None:
    """As on the decoder, which adapts the same places."""
    section = section_of(type=kind, target_modules=targets, layers_to_transform=[1])
    if targets == r".*layers\.[01]\.mlp\..*":  # not the activation between them
        section = section.model_copy(update={"target_modules": r".*layers\.[01]\.mlp\..*_proj"})
    model = made(tiny_llama, section)
    base = model.get_base_model()
    there = {name for name, one in base.named_modules() if "default" in getattr(one, "lora_A", {})}
    names = [name for name, one in base.named_modules() if name.endswith("_proj")]
    assert there == set(ranks(section, names)) and there and all(".layers.1." in name for name in there)


@pytest.mark.parametrize("numbers", [[0, 7], [-1], []])
def test_layers_that_the_base_has_not_are_refused(tiny_llama: Path, numbers: list[int]) -> None:
    base = resolve(str(tiny_llama))
    settings = config.load({"base_model": "owner/model", "adapter": {"type": "lora", "layers_to_transform": numbers}})
    with pytest.raises(AssetError, match=r"layers_to_transform") as caught:
        named.check_layers(settings, base, BUILT)
    assert f"numbers from 0 to {base.spec.layers - 1}" in str(caught.value)


def test_butterfly_factors_that_peft_would_leave_out_are_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"type": "boft", "boft_n_butterfly_factor": 2}
    with pytest.raises(AssetError, match="needs PEFT's extension for CUDA GPUs: the model is on the cpu"):
        made(tiny_llama, section_of(**two))
    settings = config.load({"base_model": "owner/model", "adapter": two})
    with pytest.raises(AssetError, match="training is on the cpu"):
        named.check_butterflies(settings, "cpu")
    monkeypatch.setattr(named, "which", lambda name: None)
    with pytest.raises(AssetError, match="ninja is not installed"):
        named.check_butterflies(settings, "cuda:0")
    named.check_butterflies(settings, "cuda:0", here=False)
    monkeypatch.setattr(named, "which", lambda name: f"/usr/bin/{name}")
    named.check_butterflies(settings, "cuda:0")
    for one in ({"type": "boft"}, {"type": "lora"}):
        named.check_butterflies(config.load({"base_model": "owner/model", "adapter": one}), "cpu")
