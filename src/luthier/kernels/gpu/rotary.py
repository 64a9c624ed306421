"""Rotation and the split into queries, keys and values, in one reading of the fused product; and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turn(
    fused, q, k, v, cos, sin, heads, kv_heads, head_dim, half,
    BACK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = fused + (token * (heads + 2 * kv_heads) + head) * head_dim
    if head < heads:
        split = q + (token * heads + head) * head_dim
    elif head < heads + kv_heads:
        split = k + (token * kv_heads + head - heads) * head_dim
    else:
        split = v + (token * kv_heads + head - heads - kv_heads) * head_dim
    source = split if BACK else row
    target = row if BACK else split
    place = tl.arange(0, HALF_BLOCK)
    inside = place < half
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + place, mask=inside, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        c = tl.load(cos + token * half + place, mask=inside, other=0.0)
        s = tl.load(sin + token * half + place, mask=inside, other=0.0)
        if BACK:
            s = -s
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    tl.store(target + place, first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + half + place, second.to(target.dtype.element_ty), mask=inside)
    if REST_BLOCK > 0:
        rest = 2 * half + tl.arange(0, REST_BLOCK)
        tl.store(target + rest, tl.load(source + rest, mask=rest < head_dim, other=0.0), mask=rest < head_dim)


def _launch(head_dim: int, half: int) -> dict[str, int]:
    rest = head_dim - 2 * half
    return {
        "HALF_BLOCK": triton.next_power_of_2(half),
        "REST_BLOCK": triton.next_power_of_2(rest) if rest else 0,
        "num_warps": 1,
    }


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `luthier.kernels.rotary.rotate`."""
    assert qkv.is_contiguous()
    tokens, half = len(qkv), cos.shape[1]
    q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    k, v = (torch.empty(tokens, kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    if tokens:
        _turn[(tokens, heads + 2 * kv_heads)](
            qkv, q, k, v, cos, sin, heads, kv_heads, head_dim, half, BACK=False, **_launch(head_dim, half)
        )
    return q, k, v


def rotate_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """See `luthier.kernels.rotary.rotate_backward`."""
    tokens, heads, head_dim = grad_q.shape
    kv_heads, half = grad_k.shape[1], cos.shape[1]
    out = torch.empty(tokens, (heads + 2 * kv_heads) * head_dim, dtype=grad_q.dtype, device=grad_q.device)
    if tokens:
        _turn[(tokens, heads + 2 * kv_heads)](
            out, grad_q, grad_k, grad_v, cos, sin, heads, kv_heads, head_dim, half, BACK=True, **_launch(head_dim, half)
        )
    return out
