"""One query a row over cached keys and values, cut into stretches that run side by side and are joined afterwards.

The queries that share a key head are the rows of one small product, so keys and values are read once (flash-decoding).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

BLOCK = 64  # keys read at a time
PROGRAMS = 4  # to start a streaming multiprocessor, before more stretches are no help
STRETCHES = 32  # at most


@triton.jit
def _stretch(
    q, k, v, held, out, part, stats, scale, softcap, stretches,
    row_k, head_k, row_v, head_v, kv_heads, window,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    number = tl.program_id(2)
    stop = tl.load(held + row).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(stop - window, 0)
    each = tl.cdiv(tl.cdiv(stop - first, stretches), BLOCK) * BLOCK
    first = first + number * each
    stop = tl.minimum(first + each, stop)

    member = tl.arange(0, GROUP_BLOCK)[:, None]
    across = tl.arange(0, WIDTH_BLOCK)
    query = (row * kv_heads + head) * GROUP + member  # its index among all rows' heads
    used = (member < GROUP) & (across[None, :] < WIDTH)
    asked = tl.load(q + query * WIDTH + across[None, :], mask=used, other=0.0)
    keys = k + row * row_k + head.to(tl.int64) * head_k
    values = v + row * row_v + head.to(tl.int64) * head_v

    most = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    gathered = tl.zeros((GROUP_BLOCK, WIDTH_BLOCK), tl.float32)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < stop
        own_k = tl.load(
            keys + place[None, :] * WIDTH + across[:, None],
            mask=inside[None, :] & (across[:, None] < WIDTH), other=0.0,
        )  # fmt: skip
        scores = tl.dot(asked, own_k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weights, 1)
        own_v = tl.load(
            values + place[:, None] * WIDTH + across[None, :],
            mask=inside[:, None] & (across[None, :] < WIDTH), other=0.0,
        )  # fmt: skip
        gathered = gathered * fade[:, None] + tl.dot(weights.to(own_v.dtype), own_v, input_precision="ieee")
        most = higher
    if WHOLE:
        tl.store(out + query * WIDTH + across[None, :], (gathered / total[:, None]).to(out.dtype.element_ty), mask=used)
    else:
        spot = query * stretches + number
        tl.store(part + spot * WIDTH + across[None, :], gathered, mask=used)
        alone = (member < GROUP) & (tl.arange(0, 1)[None, :] == 0)
        tl.store(stats + spot * 2, most[:, None], mask=alone)
        tl.store(stats + spot * 2 + 1, total[:, None], mask=alone)


@triton.jit
def _join(part, stats, out, stretches, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, COUNT: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    across = tl.arange(0, WIDTH_BLOCK)
    number = tl.arange(0, COUNT)
    there = number < stretches
    most = tl.load(stats + (query * stretches + number) * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + (query * stretches + number) * 2 + 1, mask=there, other=0.0)
    weight = tl.exp(most - tl.max(most, 0))  # 0 for a stretch that held no key
    found = tl.load(
        part + (query * stretches + number[:, None]) * WIDTH + across[None, :],
        mask=there[:, None] & (across[None, :] < WIDTH), other=0.0,
    )  # fmt: skip
    whole = tl.sum(found * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + query * WIDTH + across, whole.to(out.dtype.element_ty), mask=across < WIDTH)


def attend_cached(
    q_rnd: torch.Tensor,
    k_rncd: torch.Tensor,
    v_rncd: torch.Tensor,
    held_r: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    rows, heads, width = q_rnd.shape
    assert k_rncd.stride(2) == v_rncd.stride(2) == width, "the keys of a head lie together"
    kv_heads, places = k_rncd.shape[1:3]
    group = heads // kv_heads
    stretches = _stretches(rows * kv_heads, min(places, window or places), q_rnd.device)
    out = torch.empty_like(q_rnd)
    part = stats = out
    if stretches > 1:
        part = torch.empty(rows * heads, stretches, width, device=out.device, dtype=torch.float32)
        stats = torch.empty(rows * heads, stretches, 2, device=out.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _stretch[(rows, kv_heads, stretches)](
        q_rnd, k_rncd, v_rncd, held_r, out, part, stats, scale, softcap or 1.0, stretches,
        k_rncd.stride(0), k_rncd.stride(1), v_rncd.stride(0), v_rncd.stride(1), kv_heads, window or 0,
        GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), WIDTH=width, WIDTH_BLOCK=max(16, block),
        WINDOW=window is not None, SOFTCAP=softcap is not None, WHOLE=stretches == 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if stretches > 1:
        _join[(rows * heads,)](
            part, stats, out, stretches,
            WIDTH=width, WIDTH_BLOCK=block, COUNT=triton.next_power_of_2(stretches), num_warps=4,
        )  # fmt: skip
    return out


def _stretches(programs: int, places: int, device: torch.device) -> int:
    """How many stretches fill the device; none shorter than two readings."""
    return max(1, min(STRETCHES, PROGRAMS * _processors(device) // programs, places // (2 * BLOCK)))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
