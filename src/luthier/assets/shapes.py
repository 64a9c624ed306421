"""Shapes of well-known bases, so that `luthier plan` answers without the hub. Figures of their configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.types import ModelSpec

# name -> architecture, layers, hidden, intermediate, heads, key heads, head size, vocabulary, context, tied head
_LLAMA3 = ("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128, 128256, 131072, False)
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int, int, bool]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("LlamaForCausalLM", 32, 960, 2560, 15, 5, 64, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("LlamaForCausalLM", 24, 2048, 8192, 32, 32, 64, 49152, 8192, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2ForCausalLM", 24, 896, 4864, 14, 2, 64, 151936, 32768, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2ForCausalLM", 28, 1536, 8960, 12, 2, 128, 151936, 32768, True),
    "Qwen/Qwen2.5-7B-Instruct": ("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 128, 152064, 32768, False),
    "Qwen/Qwen3-0.6B": ("Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151936, 40960, True),
    "Qwen/Qwen3-4B-Instruct-2507": ("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 128, 151936, 262144, True),
    "Qwen/Qwen3-8B": ("Qwen3ForCausalLM", 36, 4096, 12288, 32, 8, 128, 151936, 40960, False),
    "meta-llama/Llama-2-7b-hf": ("LlamaForCausalLM", 32, 4096, 11008, 32, 32, 128, 32000, 4096, False),
    "huggyllama/llama-7b": ("LlamaForCausalLM", 32, 4096, 11008, 32, 32, 128, 32000, 2048, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("LlamaForCausalLM", 16, 2048, 8192, 32, 8, 64, 128256, 131072, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("LlamaForCausalLM", 28, 3072, 8192, 24, 8, 128, 128256, 131072, True),
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3,
    "google/gemma-3-1b-it": ("Gemma3ForCausalLM", 26, 1152, 6912, 4, 1, 256, 262144, 32768, True),
    "mistralai/Mistral-7B-Instruct-v0.3": ("MistralForCausalLM", 32, 4096, 14336, 32, 8, 128, 32768, 32768, False),
    "microsoft/Phi-4-mini-instruct": ("Phi3ForCausalLM", 32, 3072, 8192, 24, 8, 128, 200064, 131072, True),
    "tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3": _LLAMA3,
}

# What else of a config.json decides how a model is run, in its own keys.
_STATED: Mapping[str, Mapping[str, Any]] = {
    "microsoft/Phi-4-mini-instruct": {"rope_scaling": {"type": "longrope"}},
}


def known_config(repository: str) -> Mapping[str, Any]:
    """What the list states of a model's config.json beside its shape; mostly nothing."""
    return _STATED.get(repository, {})


def known_shape(repository: str) -> ModelSpec | None:
    """The facts of a model of the list, with the number of its weights computed from them; None for another name."""
    found = _SHAPES.get(repository)
    if found is None:
        return None
    architecture, layers, hidden, inner, heads, kv, size, vocab, context, tied = found
    layer = hidden * size * 2 * (heads + kv) + 3 * hidden * inner + 2 * hidden
    weights = layers * layer + hidden + vocab * hidden * (1 if tied else 2)
    return ModelSpec(architecture, weights, layers, hidden, inner, heads, kv, size, vocab, context, tied, "bfloat16")
