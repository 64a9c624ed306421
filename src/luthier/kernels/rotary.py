"""Rotary positions: the fused query-key-value product becomes rotated heads (Su et al. 2021, half-split form)."""

from __future__ import annotations

import torch

from luthier.kernels.backend import fused, wide

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotate(
    qkv_to: torch.Tensor, cos_td: torch.Tensor, sin_td: torch.Tensor, heads: int, kv_heads: int, head_dim: int
) -> Heads:
    """[t, heads, d] queries, [t, kv_heads, d] keys, both rotated, and [t, kv_heads, d] values, each contiguous.

    ``qkv_to`` [t, (heads + 2 kv_heads) d]. ``cos_td`` and ``sin_td`` [t, half the rotated part of d] in fp32 (fp64).
    """
    if fused(qkv_to):
        from luthier.kernels.gpu import rotary as gpu

        return gpu.rotate(qkv_to, cos_td, sin_td, heads, kv_heads, head_dim)
    all_tnd = qkv_to.view(len(qkv_to), heads + 2 * kv_heads, head_dim)
    rotated = _turn(all_tnd[:, : heads + kv_heads], cos_td, sin_td)
    return rotated[:, :heads].contiguous(), rotated[:, heads:].contiguous(), all_tnd[:, heads + kv_heads :].contiguous()


def rotate_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos_td: torch.Tensor, sin_td: torch.Tensor
) -> torch.Tensor:
    """[t, (heads + 2 kv_heads) d]: the gradients of queries and keys turned back, beside that of the values."""
    if fused(grad_q):
        from luthier.kernels.gpu import rotary as gpu

        return gpu.rotate_backward(grad_q, grad_k, grad_v, cos_td, sin_td)
    turned = _turn(torch.cat([grad_q, grad_k], 1), cos_td, -sin_td)
    return torch.cat([turned, grad_v], 1).flatten(1)


def _turn(x_tnd: torch.Tensor, cos_td: torch.Tensor, sin_td: torch.Tensor) -> torch.Tensor:
    half = cos_td.shape[-1]
    first, second, rest = wide(x_tnd).split([half, half, x_tnd.shape[-1] - 2 * half], -1)
    cos, sin = cos_td[:, None], sin_td[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x_tnd.dtype)
