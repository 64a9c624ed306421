"""What a base's config.json may say: numbers that are numbers, and no more than its weight files can hold.

Modules and buffers are made as a config says before a weight is read. So every size is held against the number of
weights in the files: what is made is then in proportion to what was downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import AssetError, Fault
from luthier.types import ModelSpec

PACKED = 16  # weights that one number of a file may stand for: eight in an int32, and some room
LAYERS, EXPERTS, HEAD = 4096, 65_536, 65_536  # far beyond any model
LARGEST = 2**40
# What a size is called in config.json: the name that transformers gives it first, then those that its `attribute_map`
# of some architecture leads to, those of a decoder before those of an encoder. Read here, so that torch is not loaded.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "decoder_attention_heads",
              "num_decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "kv_n_heads"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "context_length"),
}  # fmt: skip
EXPERTS_NAMED = ("num_experts", "num_local_experts", "n_routed_experts")
COUNTS = frozenset({*(name for names in NAMES.values() for name in names), *EXPERTS_NAMED})
SIZES = {"layers": "layers", "hidden size": "hidden", "vocabulary": "vocab"}  # that a model cannot be without
ROTATED = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base",
           "partial_rotary_factor")  # fmt: skip


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a config whose sizes are no sizes. What it leaves out, or leaves empty, is not looked at.

    Raises:
        AssetError: ``asset-damaged`` with all faults.
    """
    text = config.get("text_config")
    faults = [
        Fault("asset-damaged", f"{name} of config.json is not {what}", str(where), value, what, "get the model again")
        for part in (config, text if isinstance(text, Mapping) else {})
        for name, value in part.items()
        if (what := _expected(name, value)) is not None
    ]
    if faults:
        raise AssetError(faults)


def _expected(name: str, value: Any) -> str | None:
    """What the value of a key should be, where it is something else."""
    if value is None:
        return None
    if name in COUNTS:
        counts = value if isinstance(value, list) and value else [value]  # some have one a layer
        fine = all(_is_count(count) and 1 <= count <= LARGEST for count in counts)
        return None if fine else f"a whole number from 1 to {LARGEST:,}"
    if name == "architectures":
        fine = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return None if fine else "a list of names"
    if name in ("auto_map", "rope_parameters", "rope_scaling", "text_config", "quantization_config"):
        return None if isinstance(value, Mapping) else "a mapping"
    if name in ("sliding_window", "rms_norm_eps"):
        fine = isinstance(value, (int, float)) and 0 <= value < math.inf
        return None if fine else "a number, not negative"
    if name.endswith(("dropout", "pdrop")):
        return None if isinstance(value, (int, float)) and 0 <= value <= 1 else "a number from 0 to 1"
    if name == "model_type":
        return None if isinstance(value, str) else "a name"
    if name == "layer_types":
        fine = isinstance(value, list) and len(value) <= LAYERS and all(isinstance(one, str) for one in value)
        return None if fine else f"a list of at most {LAYERS:,} names"
    return None


def _is_count(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(config: Mapping[str, Any], spec: ModelSpec, where: Path) -> None:
    """Refuse a config that describes a model far larger than its weight files.

    Raises:
        AssetError: ``asset-damaged``; ``asset-unsupported`` where the config does not say how large the model is.
    """
    named = {"layers": spec.layers, "hidden size": spec.hidden, "vocabulary": spec.vocab}
    if unsaid := [name for name, size in named.items() if size < 1]:
        raise AssetError(
            "asset-unsupported",
            f"config.json does not say how large the model is: {', '.join(unsaid)}",
            where=str(where),
            received=spec.architecture,
            allowed="; ".join(f"{name} as one of {', '.join(NAMES[SIZES[name]])}" for name in unsaid),
            fix=_unsaid(config, unsaid),
        )
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert text is not None
    experts = max(_largest(text.get(name)) for name in EXPERTS_NAMED)
    learned = 0 if any(name in part for name in ROTATED for part in (text, config)) else spec.context
    sizes = {
        "vocabulary x hidden size": spec.vocab * spec.hidden,
        "layers x hidden size x intermediate size": spec.layers * spec.hidden * spec.intermediate,
        "layers x hidden size x heads x head size": spec.layers * spec.hidden * spec.heads * spec.head_dim,
        "layers x hidden size x experts": spec.layers * spec.hidden * experts,
        "positions x hidden size": learned * spec.hidden,
    }
    limits = dict.fromkeys(sizes, PACKED * spec.parameters)
    sizes |= {"layers": spec.layers, "experts": experts, "head size": spec.head_dim, "key heads": spec.kv_heads}
    limits |= {"layers": LAYERS, "experts": EXPERTS, "head size": HEAD, "key heads": max(spec.heads, 1)}
    faults = [
        Fault(
            "asset-damaged",
            f"config.json describes a larger model than its files hold: {name}",
            str(where),
            f"{size:,}",
            f"at most {limits[name]:,}",
            "get the model again",
        )
        for name, size in sizes.items()
        if size > limits[name]
    ]
    if faults:
        raise AssetError(faults)


def _unsaid(config: Mapping[str, Any], unsaid: list[str]) -> str:
    """What helps where sizes are not told: the config of a model that keeps them elsewhere cannot be mended."""
    keys = " and ".join(NAMES[SIZES[name]][0] for name in unsaid)
    if "model_type" not in config:
        return "get its whole config.json from the publisher"
    return f"add {keys} to its config.json if the model's description tells them; else choose another base"


def _largest(value: Any) -> int:
    values = value if isinstance(value, list) else [value]
    return max((int(one) for one in values if _is_count(one)), default=0)
