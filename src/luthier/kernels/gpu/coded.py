"""Products of a few rows with matrices that stay in 4 bits.

A program goes through some blocks of some rows of the matrix and leaves a partial sum for each row of x; `_join` adds
these up, always in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from luthier.kernels.nf4 import Packed

OUTS = 4  # rows of the matrix that a program multiplies with
BLOCKS = 16  # of each that it reads at a time
PROGRAMS = 16  # to start a streaming multiprocessor, before more stretches are no help
STRETCHES = 16  # at most
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _multiply(
    x, codes, table, scales, scale_table, scale_scales, offset, part, outs, half, first, total, each,
    BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, DOUBLE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    own = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    stretch = tl.program_id(1)
    inside = (own < outs)[:, None, None]
    first_block = (own * (half // HALF))[:, None, None]
    byte = tl.arange(0, HALF)[None, None, :]
    member = tl.arange(0, ROWS_BLOCK)[None, :]
    sums = tl.zeros((OUTS, ROWS_BLOCK), tl.float32)
    for start in range(stretch * each, tl.minimum(stretch * each + each, half // HALF), BLOCKS):
        number = (start + tl.arange(0, BLOCKS))[None, :, None]
        used = number < half // HALF
        there = inside & used
        block = first_block + number
        scale = tl.load(scales + block, mask=there, other=0)
        if DOUBLE:
            outer = tl.load(scale_scales + block // SCALE_BLOCK, mask=there, other=0.0)
            scale = tl.load(scale_table + scale.to(tl.int32)) * outer + offset
        both = tl.load(codes + block * HALF + byte, mask=there, other=0).to(tl.int32)
        even = (tl.load(table + (both >> 4)) * scale).to(DTYPE).to(tl.float32)
        odd = (tl.load(table + (both & 15)) * scale).to(DTYPE).to(tl.float32)
        for row in tl.static_range(ROWS):
            x_even = tl.load(x + row * half + number * HALF + byte, mask=used, other=0.0)
            x_odd = tl.load(x + (ROWS + row) * half + number * HALF + byte, mask=used, other=0.0)
            found = tl.sum(tl.sum(even * x_even + odd * x_odd, 2), 1)
            sums += tl.where(member == row, found[:, None], 0.0)
    own = own[:, None]
    target = part + (stretch * ROWS + member) * total + first + own
    tl.store(target, sums, mask=(own < outs) & (member < ROWS))


@triton.jit
def _join(
    part, bias, residual, out, count, total, stretches,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    sums = tl.zeros((BLOCK,), tl.float32)
    for stretch in range(stretches):
        sums += tl.load(part + stretch * count + place, mask=inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + place % total, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


def times(
    x: torch.Tensor, parts: Sequence[Packed], bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """See `luthier.kernels.coded.times`."""
    rows, half = len(x), x.shape[1] // 2
    apart = torch.empty(2, rows, half, device=x.device, dtype=torch.float32)  # even and odd columns
    apart.copy_(x.reshape(rows, half, 2).permute(2, 0, 1))
    total, least = sum(part.shape[0] for part in parts), min(part.shape[0] for part in parts)
    wanted = triton.cdiv(PROGRAMS * _multiprocessors(x.device), triton.cdiv(least, OUTS))
    blocks = 2 * half // parts[0].block
    tiles = triton.cdiv(blocks, BLOCKS)
    each = triton.cdiv(tiles, max(1, min(wanted, STRETCHES))) * BLOCKS
    stretches = triton.cdiv(blocks, each)
    sums = torch.empty(stretches, rows, total, device=x.device, dtype=torch.float32)
    first = 0
    for packed in parts:
        double, outs = packed.scale_table is not None, packed.shape[0]
        _multiply[(triton.cdiv(outs, OUTS), stretches)](
            apart, packed.codes, packed.table, packed.scales,
            packed.scale_table if double else packed.table,
            packed.scale_scales if double else packed.table,
            packed.offset, sums, outs, half, first, total, each,
            BLOCK=packed.block, SCALE_BLOCK=packed.scale_block, DOUBLE=double, DTYPE=KINDS[x.dtype], ROWS=rows,
            ROWS_BLOCK=triton.next_power_of_2(rows), OUTS=OUTS, BLOCKS=BLOCKS, num_warps=2,
            enable_fp_fusion=False,  # the weights are those of `dequantise`, to the bit
        )  # fmt: skip
        first += outs
    out = x.new_empty(rows, total)
    _join[(triton.cdiv(out.numel(), 1024),)](
        sums, out if bias is None else bias, out if residual is None else residual.contiguous(), out,
        out.numel(), total, stretches, BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK=1024,
    )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
