"""RMSNorm, one row a program: a row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, weight, out, rstd, stride, width, eps, offset, BLOCK: tl.constexpr, GEMMA: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, scale)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    if GEMMA:
        result = value * scale * (offset + gain.to(tl.float32))
    else:  # the reference rounds to the type of x before the weight is applied
        result = (value * scale).to(out.dtype.element_ty).to(tl.float32) * gain.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, rstd, residual, out, stride, width, offset, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(rstd + row)
    normal = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
    gain = offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32) * gain
    result = scale * (scaled - normal * (tl.sum(scaled * normal, 0) / width))
    if HAS_RESIDUAL:
        result += tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `luthier.kernels.norm.rms_norm`."""
    rows, width = x.shape
    assert x.stride(1) == 1
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _forward[(rows,)](
            x, weight, out, rstd, x.stride(0), width, eps, float(offset), GEMMA=offset != 0, **_launch(width)
        )
    return out, rstd


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    residual_grad: torch.Tensor | None,
) -> torch.Tensor:
    """See `luthier.kernels.norm.rms_norm_backward`."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grad = grad.contiguous()
    residual = grad if residual_grad is None else residual_grad.contiguous()
    if rows:
        _backward[(rows,)](
            grad, x, weight, rstd, residual, out, x.stride(0), width, float(offset),
            HAS_RESIDUAL=residual_grad is not None, **_launch(width),
        )  # fmt: skip
    return out
