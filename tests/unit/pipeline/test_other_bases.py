"""Bases of other families than the decoder's run through transformers, under the names that their configs use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_another_family_trains(family: str, base_of: Any, train: Any) -> None:
    done = train(base_model=str(base_of(family, **FAMILIES[family])), trainer__train_steps=1)
    assert done.standing == "new" and (done.folder / "adapter").is_dir()
