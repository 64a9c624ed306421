"""Writes a safetensors file tensor by tensor, so that a checkpoint takes no memory beside the copy it is made from.

Format: eight bytes with the length of the header, the header as JSON, the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors). Reading is left to the library, which checks all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

ALIGNED = 8
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous tensors on the CPU under their names. Raises OSError, and KeyError on a type without a name."""
    header, end = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
