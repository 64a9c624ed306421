"""Bases of other families than the decoder's run through transformers, under the names that their configs use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import AssetError

FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
               "max_position_embeddings": 256},
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 256},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}  # fmt: skip


@pytest.fixture
def base_of(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tiny random model of a family, with the tiny Llama's tokenizer."""
    import torch
    import transformers

    def make(family: str, **values: Any) -> Path:
        folder = tmp_path / family
        words = len(transformers.AutoTokenizer.from_pretrained(tiny_llama))
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = getattr(transformers, f"{family}Config")(vocab_size=words, **values)
            getattr(transformers, f"{family}ForCausalLM")(made).save_pretrained(folder)
        return folder

    return make


MIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256}  # fmt: skip


def test_experts_that_peft_cannot_drop_out_are_refused_with_what_helps(base_of: Any, train: Any) -> None:
    base = str(base_of("Mixtral", **MIXTRAL))
    with pytest.raises(AssetError) as caught:
        train(base_model=base, adapter={"type": "lora", "r": 4, "dropout": 0.1}, trainer__train_steps=1)
    fix = str(caught.value.faults[0].fix)
    assert "adapter.dropout: 0" in fix and "q_proj" in fix and "type: lora" not in fix
    for number, adapter in enumerate(({"dropout": 0}, {"dropout": 0.1, "target_modules": ["q_proj", "v_proj"]})):
        done = train(
            f"run{number}", base_model=base, adapter={"type": "lora", "r": 4} | adapter, trainer__train_steps=1
        )
        assert (done.folder / "adapter").is_dir()


def test_all_linear_leaves_out_what_peft_cannot_adapt_of_a_mamba(base_of: Any, train: Any) -> None:
    told: list[Any] = []
    base = base_of("Mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    done = train(base_model=str(base), trainer__train_steps=1, sink=told.append)
    weights = [name for name in done.tuned.model.module.state_dict() if ".lora_A" in name]
    placed = {name.split(".lora_A")[0].rpartition(".")[2] for name in weights}
    assert placed and "out_proj" not in placed
    assert any("out_proj" in getattr(event, "text", "") for event in told)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_another_family_trains(family: str, base_of: Any, train: Any) -> None:
    done = train(base_model=str(base_of(family, **FAMILIES[family])), trainer__train_steps=1)
    assert done.standing == "new" and (done.folder / "adapter").is_dir()
