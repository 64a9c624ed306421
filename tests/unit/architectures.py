"""A tiny random model of every architecture that the decoder knows: what its tests and the engine's share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3", {"sliding_window": 4, "query_pre_attn_scalar": 8,
                          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


def make(folder: Path, case: str) -> Any:
    """A random model of the architecture, in fp64, also saved in ``folder``."""
    family, special = CASES[case]
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    values = {key: value for key, value in COMMON.items() if not (family == "Phi3" and key == "head_dim")}
    config = getattr(transformers, name)(**values | special)
    config._attn_implementation = "eager"  # the only one that knows every switch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
        for parameter in model.parameters():  # norms and biases too, so that each has its effect
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
