"""The decoder's remaining steps as autograd nodes: norms of their own, rotation, selecting, recomputing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from luthier.kernels import host_training
from luthier.kernels.linear import Linear, Norm
from luthier.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad
from luthier.kernels.rotary import Heads, rotate, rotate_backward

Grads = tuple[torch.Tensor | None, ...]


def product(
    op: Linear, x: torch.Tensor, key_t: torch.Tensor | None, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Linear.with_input`, in the form that suits the device and what is trained."""
    return (host_training.product if host_training.serves(op, x) else Linear.with_input)(op, x, key_t, residual)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        out, rstd_t = rms_norm(x, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd_t)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, weight, rstd_t = ctx.saved_tensors
        grad = grads[0].contiguous()
        weight_grad = rms_norm_weight_grad(grad, x, rstd_t).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return rms_norm_backward(grad, x, weight, rstd_t, ctx.offset), weight_grad, None, None


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMSNorm over the last dimension of [t, h]."""
    out: torch.Tensor = _Normed.apply(x, norm.weight, norm.eps, norm.offset)  # type: ignore[no-untyped-call]
    return out


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, head_dim: int
    ) -> Heads:
        ctx.save_for_backward(cos, sin)
        return rotate(qkv, cos, sin, heads, kv_heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        q, k, v = (grad.contiguous() for grad in grads)
        return rotate_backward(q, k, v, *ctx.saved_tensors), None, None, None, None, None


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, head_dim: int) -> Heads:
    """`kernels.rotary.rotate`, differentiable in the fused product."""
    out: Heads = _Rotated.apply(qkv, cos, sin, heads, kv_heads, head_dim)  # type: ignore[no-untyped-call]
    return out


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.count = len(x)
        ctx.save_for_backward(rows)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        (rows,) = ctx.saved_tensors
        out = grads[0].new_zeros(ctx.count, *grads[0].shape[1:])
        return out.index_copy_(0, rows, grads[0]), None


def taken(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] for rows that differ: the gradient is then a plain copy, without atomic additions."""
    out: torch.Tensor = _Taken.apply(x, rows)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[torch.Tensor], torch.Tensor], offload: bool, x: torch.Tensor, anchor: torch.Tensor
    ) -> torch.Tensor:
        ctx.run, ctx.device, ctx.offload = run, x.device, offload
        ctx.kept = _to_host(x) if offload else x.detach()
        return run(x)  # autograd is off in here, so nothing inside is kept

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        needs_x = ctx.needs_input_grad[2]
        x = ctx.kept.to(ctx.device, non_blocking=True).detach().requires_grad_(needs_x)
        ctx.kept = None
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, grads[0])
        return None, None, x.grad if needs_x else None, None


def recomputed(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, anchor: torch.Tensor, *, offload: bool
) -> torch.Tensor:
    """run(x), keeping only x (on the host with ``offload``); everything inside is computed again when it is needed.

    ``anchor``: any tensor that requires a gradient, so that the node exists where x itself requires none. Weights used
    inside receive their gradients during the backward pass.
    """
    if not torch.is_grad_enabled():
        return run(x)
    out: torch.Tensor = _Recomputed.apply(run, offload, x, anchor)  # type: ignore[no-untyped-call]
    return out


def in_tiles(
    run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    x_th: torch.Tensor,
    key_t: torch.Tensor | None,
    tile: int,
    anchor: torch.Tensor,
) -> torch.Tensor:
    """run(x, key) for something that treats each token alone, ``tile`` tokens at a time (0: all), keeping only x.

    ``anchor``: as of `recomputed`.
    """
    if not 0 < tile < len(x_th):
        return run(x_th, key_t)
    keys = [None] * -(-len(x_th) // tile) if key_t is None else key_t.split(tile)
    parts = [
        recomputed(lambda x, key=key: run(x, key), x, anchor, offload=False)  # type: ignore[misc]
        for x, key in zip(x_th.split(tile), keys, strict=True)
    ]
    return torch.cat(parts)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if x.device.type != "cuda":
        return x.detach().to("cpu", copy=True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x.detach(), non_blocking=True)
    return host
