"""act(gate) * up, and its gradient with the product again, each in one reading."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _act(x, SILU: tl.constexpr):
    if SILU:
        return x * _sigmoid(x)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * _sigmoid(2 * inner)  # 0.5 x (1 + tanh(inner))


@triton.jit
def _slope(x, SILU: tl.constexpr):
    if SILU:
        gate = _sigmoid(x)
        return gate * (1 + x * (1 - gate))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    gate = _sigmoid(2 * inner)
    return gate + 2 * x * gate * (1 - gate) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


@triton.jit
def _forward(fused, out, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(fused + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(fused + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    acted = _act(gate, SILU).to(out.dtype.element_ty).to(tl.float32)  # the reference rounds here
    tl.store(out + row * width + columns, (acted * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, fused, fused_grad, out, width, SILU: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(fused + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(fused + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    kind = fused_grad.dtype.element_ty
    acted = _act(gate, SILU).to(kind).to(tl.float32)
    tl.store(fused_grad + row * 2 * width + columns, (slope * up * _slope(gate, SILU)).to(kind), mask=inside)
    tl.store(fused_grad + row * 2 * width + width + columns, (slope * acted).to(kind), mask=inside)
    if AGAIN:
        tl.store(out + row * width + columns, (acted * up).to(kind), mask=inside)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `luthier.kernels.glu.gated`."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _forward[grid](gate_up.contiguous(), out, width, SILU=activation == "silu", BLOCK=BLOCK, num_warps=4)
    return out


def gated_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `luthier.kernels.glu.gated_backward`."""
    rows, width = grad.shape
    fused_grad = torch.empty_like(gate_up)
    out = torch.empty_like(grad) if again else None
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _backward[grid](
            grad.contiguous(), gate_up.contiguous(), fused_grad, fused_grad if out is None else out, width,
            SILU=activation == "silu", AGAIN=again, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return fused_grad, out
