"""Log-probability of a target and the gradient of it with its logits, in place: two readings and one writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _forward(logits, targets, logprob, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32)
    most = float("-inf")
    total = 0.0
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        part = tl.load(start + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        bigger = tl.maximum(most, tl.max(part, 0))
        total = total * tl.exp(most - bigger) + tl.sum(tl.exp(part - bigger), 0)
        most = bigger
    lse = most + tl.log(total)
    tl.store(logprob + row, chosen - lse)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        part = tl.load(start + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        residual = tl.where(columns == target, 1.0, 0.0) - tl.exp(part - lse)
        tl.store(start + columns, residual.to(logits.dtype.element_ty), mask=columns < width)


def logprob_and_residual(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See `luthier.kernels.logprob.logprob_and_residual`."""
    assert logits.is_contiguous()
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _forward[(rows,)](logits, targets, out, width, BLOCK=BLOCK, num_warps=16)
    return out
