"""Causal attention over packed samples, forward and backward (Dao 2023, FlashAttention-2, by rows and by columns).

torch's varlen kernel is made for long samples; most training rows have one or two blocks of tokens, where it spends
its time on padding and conversions. Here a program takes one block of one sample and one head, those with the most to
do first, so that none of them is left over when all others are done. Statistics are fp32.

Names: ``m`` rows (queries) of a block, ``n`` columns (keys), ``d`` head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _visible(row, column, length, WINDOW: tl.constexpr):
    seen = (column[None, :] <= row[:, None]) & (row[:, None] < length)
    if WINDOW > 0:
        seen = seen & (column[None, :] > row[:, None] - WINDOW)
    return seen


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q, k, v, out, lse, starts, scale, tokens, heads, kv_heads, head_dim,
    BLOCK: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, sample, block = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(starts + sample)
    length = tl.load(starts + sample + 1) - start
    if block * BLOCK >= length:
        return
    own = head // (heads // kv_heads)
    start = start.to(tl.int64)
    row, dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    in_rows = (row[:, None] < length) & (dim[None, :] < head_dim)
    at = ((start + row[:, None]) * heads + head) * head_dim + dim[None, :]
    q_md = tl.load(q + at, mask=in_rows, other=0.0)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_md = tl.zeros((BLOCK, D), tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, (block * BLOCK - WINDOW + 1) // BLOCK * BLOCK)
    for n in range(first, tl.minimum((block + 1) * BLOCK, length), BLOCK):
        column = n + tl.arange(0, BLOCK)
        in_columns = (column[:, None] < length) & (dim[None, :] < head_dim)
        there = ((start + column[:, None]) * kv_heads + own) * head_dim + dim[None, :]
        k_nd = tl.load(k + there, mask=in_columns, other=0.0)
        v_nd = tl.load(v + there, mask=in_columns, other=0.0)
        score = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * (scale * LOG2E)
        score = tl.where(_visible(row, column, length, WINDOW), score, float("-inf"))
        bigger = tl.maximum(most, tl.max(score, 1))
        safe = tl.where(bigger == float("-inf"), 0.0, bigger)
        weight = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(most - safe)
        total = total * shrink + tl.sum(weight, 1)
        sum_md = sum_md * shrink[:, None] + tl.dot(weight.to(v_nd.dtype), v_nd, input_precision="ieee")
        most = bigger
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + at, (sum_md / total[:, None]).to(out.dtype.element_ty), mask=in_rows)
    tl.store(lse + head * tokens + start + row, most + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["tokens"])
def _by_columns(
    q, k, v, grad, lse, delta, grad_k, grad_v, starts, scale, tokens, heads, kv_heads, head_dim,
    BLOCK: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    own, sample, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + sample)
    length = tl.load(starts + sample + 1) - start
    if block * BLOCK >= length:
        return
    start = start.to(tl.int64)
    column, dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    in_columns = (column[:, None] < length) & (dim[None, :] < head_dim)
    there = ((start + column[:, None]) * kv_heads + own) * head_dim + dim[None, :]
    k_nd = tl.load(k + there, mask=in_columns, other=0.0)
    v_nd = tl.load(v + there, mask=in_columns, other=0.0)
    sum_k, sum_v = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    last = length
    if WINDOW > 0:
        last = tl.minimum(length, (block + 1) * BLOCK + WINDOW - 1)
    group = heads // kv_heads
    for head in range(own * group, (own + 1) * group):
        for m in range(block * BLOCK, last, BLOCK):
            row = m + tl.arange(0, BLOCK)
            in_rows = (row[:, None] < length) & (dim[None, :] < head_dim)
            at = ((start + row[:, None]) * heads + head) * head_dim + dim[None, :]
            q_md = tl.load(q + at, mask=in_rows, other=0.0)
            grad_md = tl.load(grad + at, mask=in_rows, other=0.0)
            lse_m = tl.load(lse + head * tokens + start + row, mask=row < length, other=0.0)
            delta_m = tl.load(delta + head * tokens + start + row, mask=row < length, other=0.0)
            score = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * (scale * LOG2E)
            weight = tl.where(_visible(row, column, length, WINDOW), tl.exp2(score - lse_m[:, None]), 0.0)
            sum_v += tl.dot(tl.trans(weight.to(q_md.dtype)), grad_md, input_precision="ieee")
            slope = weight * (tl.dot(grad_md, tl.trans(v_nd), input_precision="ieee") - delta_m[:, None])
            sum_k += tl.dot(tl.trans(slope.to(q_md.dtype)), q_md, input_precision="ieee")
    tl.store(grad_k + there, (sum_k * scale).to(grad_k.dtype.element_ty), mask=in_columns)
    tl.store(grad_v + there, sum_v.to(grad_v.dtype.element_ty), mask=in_columns)


@triton.jit(do_not_specialize=["tokens"])
def _by_rows(
    q, k, v, out, grad, lse, delta, grad_q, starts, scale, tokens, heads, kv_heads, head_dim,
    BLOCK: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, sample, block = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(starts + sample)
    length = tl.load(starts + sample + 1) - start
    if block * BLOCK >= length:
        return
    own = head // (heads // kv_heads)
    start = start.to(tl.int64)
    row, dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    in_rows = (row[:, None] < length) & (dim[None, :] < head_dim)
    at = ((start + row[:, None]) * heads + head) * head_dim + dim[None, :]
    q_md = tl.load(q + at, mask=in_rows, other=0.0)
    grad_md = tl.load(grad + at, mask=in_rows, other=0.0)
    out_md = tl.load(out + at, mask=in_rows, other=0.0)
    delta_m = tl.sum(grad_md.to(tl.float32) * out_md.to(tl.float32), 1)
    tl.store(delta + head * tokens + start + row, delta_m, mask=row < length)
    lse_m = tl.load(lse + head * tokens + start + row, mask=row < length, other=0.0)
    sum_q = tl.zeros((BLOCK, D), tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, (block * BLOCK - WINDOW + 1) // BLOCK * BLOCK)
    for n in range(first, tl.minimum((block + 1) * BLOCK, length), BLOCK):
        column = n + tl.arange(0, BLOCK)
        in_columns = (column[:, None] < length) & (dim[None, :] < head_dim)
        there = ((start + column[:, None]) * kv_heads + own) * head_dim + dim[None, :]
        k_nd = tl.load(k + there, mask=in_columns, other=0.0)
        v_nd = tl.load(v + there, mask=in_columns, other=0.0)
        score = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * (scale * LOG2E)
        weight = tl.where(_visible(row, column, length, WINDOW), tl.exp2(score - lse_m[:, None]), 0.0)
        slope = weight * (tl.dot(grad_md, tl.trans(v_nd), input_precision="ieee") - delta_m[:, None])
        sum_q += tl.dot(slope.to(k_nd.dtype), k_nd, input_precision="ieee")
    tl.store(grad_q + at, (sum_q * scale).to(grad_q.dtype.element_ty), mask=in_rows)


def _launch(q: torch.Tensor, window: int | None) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    return {"BLOCK": BLOCK, "D": block_d, "WINDOW": window or 0, "num_warps": 4, "num_stages": 2}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """[t, heads, d] attention of queries to the keys of their sample up to their own, and [heads, t] base-2 lse.

    q [t, heads, d], k and v [t, kv_heads, d], contiguous; ``starts`` [s + 1] int32 on the device; no sample is longer
    than ``longest``.
    """
    tokens, heads, dim = q.shape
    out, lse = torch.empty_like(q), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _forward[(heads, len(starts) - 1, triton.cdiv(longest, BLOCK))](
        q, k, v, out, lse, starts, scale, tokens, heads, k.shape[1], dim, **_launch(q, window)
    )
    return out, lse


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, longest: int, scale: float, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of queries, keys and values."""
    tokens, heads, dim = q.shape
    blocks, samples, kv_heads = triton.cdiv(longest, BLOCK), len(starts) - 1, k.shape[1]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    _by_rows[(heads, samples, blocks)](
        q, k, v, out, grad, lse, delta, grad_q, starts, scale, tokens, heads, kv_heads, dim, **_launch(q, window)
    )
    _by_columns[(kv_heads, samples, blocks)](
        q, k, v, grad, lse, delta, grad_k, grad_v, starts, scale, tokens, heads, kv_heads, dim, **_launch(q, window)
    )
    return grad_q, grad_k, grad_v
