"""The work that every contestant does: the seed job's shape, its sample lengths, and random 7B weights to do it with.

450 samples an epoch, lengths drawn from a log-normal around 115 tokens (mean 126), the second half of each supervised,
effective batch 16.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from luthier.types import Example

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
}  # fmt: skip
VOCAB = 49152


def lengths(count: int = 450, median: int = 115) -> list[int]:
    """Tokens of each sample; the same list every time."""
    draw = random.Random(7)
    return [int(min(512, max(40, draw.lognormvariate(math.log(median), 0.5)))) for _ in range(count)]


def samples(count: int = 450, median: int = 115) -> list[Example]:
    """Random tokens at those lengths; the second half of each is supervised."""
    draw = torch.Generator().manual_seed(1)
    out = []
    for row, length in enumerate(lengths(count, median)):
        prompt = max(20, length // 2)
        ids = torch.randint(10, 32000, (length,), generator=draw).tolist()
        out.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt), row))
    return out


def make_model(folder: Path, name: str = "7b", device: str = "cuda", layers: int | None = None) -> Path:
    """A Llama of that shape with random bf16 weights, in shards of a few layers; left alone when it is there."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)

    index: dict[str, str] = {}
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, h), "lm_head.weight": matrix(VOCAB, h)}
    tensors["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
    shard = 0

    def write() -> None:
        nonlocal tensors, shard
        file = f"model-{shard:05d}.safetensors"
        save_file({key: value.cpu() for key, value in tensors.items()}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        tensors, shard = {}, shard + 1

    write()
    for number in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        for part, rows, columns in (
            ("self_attn.q_proj", h, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, h), ("mlp.gate_proj", f, h), ("mlp.up_proj", f, h), ("mlp.down_proj", h, f),
        ):  # fmt: skip
            tensors[f"{prefix}{part}.weight"] = matrix(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(h, dtype=torch.bfloat16)
        if number % 6 == 5 or number == shape["num_hidden_layers"] - 1:
            write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB, "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "bfloat16", **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
