"""The planner's count of what is trained is PEFT's: every kind of adapter, on every place that a config can name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from luthier import config
from luthier.assets.spec import read_spec, spec_of
from luthier.config.adapter import KINDS
from luthier.errors import AssetError
from luthier.model.adapters import add_adapter
from luthier.plan.shape import Shape
from luthier.plan.trained import trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import architectures

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "olora": {"type": "lora", "r": 4, "init_lora_weights": "olora"},
    "ranks": {"type": "lora", "r": 4, "rank_pattern": {"q_proj": 6, "lm_head": 2, "layers.1.self_attn.v_proj": 3}},
    "some layers": {"type": "lora", "r": 4, "layers_to_transform": [0, 2]},
    "adalora": {"type": "adalora"},
    "adalora, some layers": {"type": "adalora", "layers_to_transform": [1]},
    "ia3": {"type": "ia3"},
    "ia3 forward": {"type": "ia3", "feedforward_modules": ["q_proj"]},
    "vera": {"type": "vera", "r": 8},
    "loha": {"type": "loha", "r": 4},
    "lokr": {"type": "lokr", "r": 4},
    "lokr both": {"type": "lokr", "r": 2, "decompose_both": True},
    "lokr factor": {"type": "lokr", "r": 2, "decompose_factor": 5},
    "oft": {"type": "oft", "r": 4},
    "oft uneven": {"type": "oft", "r": 5},
    "oft size": {"type": "oft", "r": 0, "oft_block_size": 10},
    "oft shared": {"type": "oft", "r": 4, "block_share": True},
    "boft": {"type": "boft"},
    "boft number": {"type": "boft", "boft_block_size": 0, "boft_block_num": 4},
    "ln_tuning": {"type": "ln_tuning"},
}
PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "q, v": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*layers\.[01]\..*(up|down)_proj"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "gate_proj"]},
}
ON_TABLES = ("lora", "dora", "ranks", "oft", "oft uneven", "oft size", "oft shared", "ln_tuning")


def section_of(adapter: dict[str, Any]) -> Any:
    return config.load({"base_model": "owner/model", "adapter": adapter}).adapter


def made(model: Any, section: Any) -> int:
    """The weights that PEFT trains."""
    tuned = add_adapter(model, section, 0, total_steps=100)
    return sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)


def llama(tied: bool) -> Any:
    values = {"vocab_size": 264, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "head_dim": 12,
              "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**values))


def test_every_kind_is_compared() -> None:
    assert {one["type"] for one in ADAPTERS.values()} == set(KINDS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_counted_is_what_peft_makes(adapter: str, tied: bool) -> None:
    for place, values in PLACES.items():
        section, model = section_of(ADAPTERS[adapter] | values), llama(tied)
        values = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        spec = spec_of(values, sum(weight.numel() for weight in model.parameters()), "float32")
        if place == "table" and adapter not in ON_TABLES and "some layers" not in adapter:
            with pytest.raises(AssetError, match="does not fit this base"):
                made(model, section)
        else:
            assert trained(section, Shape.of(spec)).weights == made(model, section), place


@pytest.mark.parametrize("case", ["mistral-window", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_on_every_architecture(case: str, tmp_path: Path) -> None:
    architectures.make(tmp_path, case)
    shape = Shape.of(read_spec(tmp_path))
    adapters: list[dict[str, Any]] = [
        {"type": "lora", "r": 4},
        {"type": "lora", "r": 4, "bias_type": "all"},
        {"type": "lora", "r": 4, "bias_type": "lora_only", "target_modules": ["o_proj", "v_proj", "qkv_proj"]},
        {"type": "loha", "r": 4},
        {"type": "ia3"},
        {"type": "ln_tuning"},
    ]
    for adapter in adapters:
        if case == "phi3" and adapter["type"] in ("ia3", "ln_tuning"):
            continue  # PEFT knows no places there
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        section = section_of(adapter)
        assert trained(section, shape).weights == made(model, section), adapter


def test_a_pattern_of_everything_means_the_matrices_that_the_decoder_adapts(tiny_llama: Path) -> None:
    from luthier.model.decoder.lora import ranks
    from luthier.plan.support import BUILT, not_decoder

    spec = read_spec(tiny_llama)
    settings = config.load({"base_model": "owner/model", "adapter": {"type": "lora", "r": 4, "target_modules": ".*"}})
    assert not_decoder(settings, spec, BUILT) is None
    everywhere = trained(section_of({"type": "lora", "r": 4}), Shape.of(spec))
    assert trained(settings.adapter, Shape.of(spec)) == everywhere
    assert len(ranks(settings.adapter, [f"model.layers.0.mlp.{name}" for name in ("up_proj", "down_proj")])) == 2
