"""RMSNorm over the last dimension, and its gradient (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch

from luthier.kernels.backend import fused, wide


def rms_norm(
    x_th: torch.Tensor, weight_h: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, h] normalised rows and [t] reciprocal root mean squares (fp32).

    ``offset`` 0: rounded to x's type, then times the weight (Llama and most). ``offset`` 1: times 1 + weight before
    rounding (Gemma).
    """
    if fused(x_th):
        from luthier.kernels.gpu import norm as gpu

        return gpu.rms_norm(x_th, weight_h, eps, offset)
    wide_th = wide(x_th)
    rstd_t = torch.rsqrt(wide_th.square().mean(-1) + eps)
    normal_th = wide_th * rstd_t[:, None]
    if offset:
        return (normal_th * (offset + wide(weight_h))).to(x_th.dtype), rstd_t
    return normal_th.to(x_th.dtype) * weight_h.to(x_th.dtype), rstd_t


def rms_norm_backward(
    grad_th: torch.Tensor,
    x_th: torch.Tensor,
    weight_h: torch.Tensor,
    rstd_t: torch.Tensor,
    offset: float,
    residual_grad_th: torch.Tensor | None = None,
) -> torch.Tensor:
    """[t, h] gradient of x, with the gradient that reaches x on the residual path added when it is given."""
    if fused(x_th):
        from luthier.kernels.gpu import norm as gpu

        return gpu.rms_norm_backward(grad_th, x_th, weight_h, rstd_t, offset, residual_grad_th)
    scaled_th = wide(grad_th) * (offset + wide(weight_h))
    normal_th = wide(x_th) * rstd_t[:, None]
    out_th = rstd_t[:, None] * (scaled_th - normal_th * (scaled_th * normal_th).mean(-1, keepdim=True))
    if residual_grad_th is not None:
        out_th = out_th + residual_grad_th
    return out_th.to(x_th.dtype)


def rms_norm_weight_grad(grad_th: torch.Tensor, x_th: torch.Tensor, rstd_t: torch.Tensor) -> torch.Tensor:
    """[h] gradient of the weight; only full fine-tuning asks for it."""
    return (wide(grad_th) * wide(x_th) * rstd_t[:, None]).sum(0)
