"""Dropout whose mask is a hash of (token's key, column, salt)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["salt", "bound"])
def _forward(x, key, out, width, salt, bound, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = _mix(tl.load(key + row).to(tl.uint32) ^ salt.to(tl.uint32))
    bits = _mix(own + columns.to(tl.uint32) * 0x9E3779B9)
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(bits >= bound.to(tl.uint32), value * scale, 0.0)
    tl.store(out + row * width + columns, kept.to(out.dtype.element_ty), mask=inside)


def dropout(x: torch.Tensor, key: torch.Tensor, salt: int, p: float) -> torch.Tensor:
    """See `luthier.kernels.keyed.dropout`."""
    from luthier.kernels.keyed import threshold

    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _forward[grid](x, key, out, width, _signed(salt), _signed(threshold(p)), 1 / (1 - p), BLOCK=BLOCK, num_warps=4)
    return out


def _signed(value: int) -> int:
    """A 64-bit argument whatever the number, so that one kernel serves every salt."""
    return value | (1 << 40)
