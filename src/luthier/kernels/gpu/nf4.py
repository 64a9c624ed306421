"""4-bit codes to weights: a program reads 2 KiB of codes and writes 4096 weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from luthier.kernels.nf4 import Packed

CODES = 2048  # bytes of codes a program


@triton.jit
def _forward(
    codes, table, scales, scale_table, scale_scales, offset, out, count,
    BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, DOUBLE: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * CODES + tl.arange(0, CODES)
    inside = place < count
    pair = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    block = place // (BLOCK // 2)
    scale = tl.load(scales + block, mask=inside, other=0)
    if DOUBLE:
        outer = tl.load(scale_scales + block // SCALE_BLOCK, mask=inside, other=0.0)
        scale = tl.load(scale_table + scale.to(tl.int32), mask=inside, other=0.0) * outer + offset
    first = tl.load(table + (pair >> 4), mask=inside, other=0.0) * scale
    second = tl.load(table + (pair & 15), mask=inside, other=0.0) * scale
    both = tl.interleave(first, second)
    target = tl.program_id(0).to(tl.int64) * (2 * CODES) + tl.arange(0, 2 * CODES)
    tl.store(out + target, both.to(out.dtype.element_ty), mask=target < 2 * count)


def dequantise(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """See `luthier.kernels.nf4.dequantise`."""
    assert out.is_contiguous() and out.numel() == 2 * packed.codes.numel()
    double = packed.scale_table is not None
    count = packed.codes.numel()
    _forward[(triton.cdiv(count, CODES),)](
        packed.codes, packed.table, packed.scales,
        packed.scale_table if double else packed.table,
        packed.scale_scales if double else packed.table,
        packed.offset, out, count,
        BLOCK=packed.block, SCALE_BLOCK=packed.scale_block, DOUBLE=double, CODES=CODES, num_warps=8,
        enable_fp_fusion=False,  # two roundings as in the plain form, so both give the same bits
    )  # fmt: skip
    return out
