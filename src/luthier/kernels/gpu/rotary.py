"""Rotation and the split into queries, keys and values, in one reading of the fused product; and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 16  # heads a program turns together


@triton.jit
def _turn(
    fused, q, k, v, cos, sin, heads, kv_heads, head_dim, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    whole = fused + (token * (heads + 2 * kv_heads) + head) * head_dim
    own_q = q + (token * heads + head) * head_dim
    own_k = k + (token * kv_heads + head - heads) * head_dim
    own_v = v + (token * kv_heads + head - heads - kv_heads) * head_dim
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    place = tl.arange(0, HALF_BLOCK)[None, :]
    inside = place < half
    if BACK:
        first = _split_load(own_q, own_k, own_v, place, is_q & inside, is_k & inside, is_v & inside)
        second = _split_load(own_q, own_k, own_v, half + place, is_q & inside, is_k & inside, is_v & inside)
    else:
        every = (is_q | is_k | is_v) & inside
        first = tl.load(whole + place, mask=every, other=0.0).to(tl.float32)
        second = tl.load(whole + half + place, mask=every, other=0.0).to(tl.float32)
    c = tl.where(is_v, 1.0, tl.load(cos + token * half + place, mask=inside, other=0.0))
    s = tl.where(is_v, 0.0, tl.load(sin + token * half + place, mask=inside, other=0.0))
    if BACK:
        s = -s
    turned = first * c - second * s
    second = second * c + first * s
    if BACK:
        every = (is_q | is_k | is_v) & inside
        tl.store(whole + place, turned.to(fused.dtype.element_ty), mask=every)
        tl.store(whole + half + place, second.to(fused.dtype.element_ty), mask=every)
    else:
        _split_store(own_q, own_k, own_v, place, turned, is_q & inside, is_k & inside, is_v & inside)
        _split_store(own_q, own_k, own_v, half + place, second, is_q & inside, is_k & inside, is_v & inside)
    if REST_BLOCK > 0:
        rest = 2 * half + tl.arange(0, REST_BLOCK)[None, :]
        inside = rest < head_dim
        if BACK:
            value = _split_load(own_q, own_k, own_v, rest, is_q & inside, is_k & inside, is_v & inside)
            tl.store(whole + rest, value.to(fused.dtype.element_ty), mask=(is_q | is_k | is_v) & inside)
        else:
            value = tl.load(whole + rest, mask=(is_q | is_k | is_v) & inside, other=0.0).to(tl.float32)
            _split_store(own_q, own_k, own_v, rest, value, is_q & inside, is_k & inside, is_v & inside)


@triton.jit
def _split_load(q, k, v, place, is_q, is_k, is_v):
    value = tl.load(q + place, mask=is_q, other=0.0).to(tl.float32)
    value += tl.load(k + place, mask=is_k, other=0.0).to(tl.float32)
    return value + tl.load(v + place, mask=is_v, other=0.0).to(tl.float32)


@triton.jit
def _split_store(q, k, v, place, value, is_q, is_k, is_v):
    value = value.to(q.dtype.element_ty)
    tl.store(q + place, value, mask=is_q)
    tl.store(k + place, value, mask=is_k)
    tl.store(v + place, value, mask=is_v)


def _launch(head_dim: int, half: int) -> dict[str, int]:
    rest = head_dim - 2 * half
    return {
        "HEADS": HEADS,
        "HALF_BLOCK": triton.next_power_of_2(half),
        "REST_BLOCK": triton.next_power_of_2(rest) if rest else 0,
        "num_warps": 4,
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
        _turn[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))](
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
        _turn[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))](
            out, grad_q, grad_k, grad_v, cos, sin, heads, kv_heads, head_dim, half, BACK=True, **_launch(head_dim, half)
        )
    return out
