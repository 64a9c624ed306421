"""What a decoder has learned as files that others read: adapters in PEFT's format, whole models in transformers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from luthier.assets.adapter_files import no_adapter
from luthier.assets.spec import read_json
from luthier.model.adapters import require_same
from luthier.model.decoder import lora
from luthier.model.decoder.decoder import Decoder, modules
from luthier.model.decoder.load import norm_names
from luthier.model.load import read_weights
from luthier.run.atomic import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(decoder: Decoder, section: Any, folder: Path, base_name: str) -> None:
    """The adapter in PEFT's format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    pairs = decoder.pairs
    save_file(lora.state_dict(pairs), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, lora.peft_config(section, base_name, [pair.name for pair in pairs]))


def load_adapter(decoder: Decoder, folder: Path) -> None:
    """Put the weights of an adapter in PEFT's format into the decoder's pairs; all of them, and none besides.

    Raises AssetError asset-not-found or asset-damaged.
    """
    if not (folder / WEIGHTS).is_file():
        raise no_adapter(folder, WEIGHTS)
    found = read_weights(folder / WEIGHTS)
    require_same(found, lora.state_dict(decoder.pairs), folder / WEIGHTS)
    with torch.no_grad():
        for pair in decoder.pairs:
            for factor in ("lora_A", "lora_B"):
                getattr(pair, factor).copy_(found[f"{lora.PREFIX}{pair.name}.{factor}.weight"])


def save_weights(decoder: Decoder, base: Path, folder: Path, dtype: torch.dtype) -> None:
    """All weights under their architecture's names, in shards, with the base's config and tokenizer beside them."""
    import shutil

    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in named_weights(decoder)}
    save_torch_state_dict(state, folder, metadata={"format": "pt"}, max_shard_size="4GB")
    config = read_json(base / "config.json") | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in base.iterdir():
        known = ("chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json")
        if path.is_file() and ("token" in path.name or path.name in known):
            shutil.copy2(path, folder / path.name)


def named_weights(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under the name it has in the files of its architecture; fused matrices apart again."""
    yield "model.embed_tokens.weight", decoder.embedding
    if decoder.head is not None:
        yield "lm_head.weight", decoder.head
    yield "model.norm.weight", decoder.norm.weight
    for layer in decoder.layers:
        prefix = f"model.layers.{layer.number}."
        for product, parts in modules(decoder.shape).items():
            op = layer.products[product]
            matrix = op.matrix.get() if op.matrix.parameter is None else op.matrix.parameter
            for part, rows in parts.items():
                yield f"{prefix}{part}.weight", matrix[rows].clone()  # a frozen matrix is there until the next one
                if op.bias is not None:
                    yield f"{prefix}{part}.bias", op.bias[rows].clone()  # parts of one tensor would not be written
            if op.norm is not None:
                yield f"{prefix}{norm_names(decoder.shape)[product]}.weight", op.norm.weight
        for name, norm in layer.norms.items():
            alone = f"self_attn.{name}_norm" if name in ("q", "k") else norm_names(decoder.shape)[name]
            yield f"{prefix}{alone}.weight", norm.weight
