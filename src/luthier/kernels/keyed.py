"""Random masks that belong to a sample and a position, so that every way of laying out a batch draws the same.

A 32-bit integer hash (the finaliser of MurmurHash3, A. Appleby, public domain) of (token's key, column, salt). A
token's key is made on the host from (seed, step, row, turn, position); the salt names the layer and the matrix.
"""

from __future__ import annotations

import torch

from luthier.kernels.backend import fused

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser on int64 tensors that hold unsigned 32-bit numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def mix_int(x: int) -> int:
    """The same on a Python integer."""
    x &= MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def hash_of(*numbers: int) -> int:
    """One 32-bit number from several."""
    out = 0
    for number in numbers:
        out = mix_int(out * 31 + mix_int(number + GOLDEN))
    return out


def dropout(x_th: torch.Tensor, key_t: torch.Tensor, salt: int, p: float) -> torch.Tensor:
    """``x`` with each entry zeroed with probability ``p`` and the rest scaled by 1 / (1 - p).

    ``key_t`` [t] int64, unsigned 32-bit values. The same function of the gradient is its own backward pass.
    """
    if fused(x_th):
        from luthier.kernels.gpu import keyed as gpu

        return gpu.dropout(x_th, key_t, salt, p)
    columns = torch.arange(x_th.shape[1], device=x_th.device)
    bits = mix(mix(key_t ^ salt)[:, None] + columns * GOLDEN & MASK)
    return torch.where(bits >= threshold(p), x_th * (1 / (1 - p)), 0)


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return int(p * 2**32)
