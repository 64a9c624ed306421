"""Log-probabilities of chosen tokens from hidden states, a chunk of logits at a time, differentiable.

log p(y | x) = z_y - log sum exp(z), z = W x. Its gradient with respect to x is (W_y - W^T softmax(z)) times one number
a row, the gradient of that log-probability; so the forward pass computes the vector while the logits are there, and
the backward pass only scales rows: logits are made once, never kept, and no host synchronisation is needed.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from luthier.kernels.backend import fused, wide


def selected_logprob(
    hidden_nh: torch.Tensor, head_vh: torch.Tensor, targets_n: torch.Tensor, *, chunk: int, softcap: float | None = None
) -> torch.Tensor:
    """[n] log-probabilities (fp32, or fp64 for fp64 inputs) of ``targets_n`` (int64) under softmax(hidden head^T).

    ``chunk`` rows of logits exist at a time. ``softcap`` c replaces logits z by c tanh(z / c) (Gemma 2).
    """
    return cast(torch.Tensor, _SelectedLogprob.apply(hidden_nh, head_vh, targets_n, chunk, softcap))  # type: ignore[no-untyped-call]


def score(
    hidden_nh: torch.Tensor, head_vh: torch.Tensor, targets_n: torch.Tensor, *, chunk: int, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] log-probabilities and [n] whether the target was the likeliest token; without gradient."""
    logprobs, hits = [], []
    with torch.no_grad():
        for hidden_ch, targets_c in zip(hidden_nh.split(chunk), targets_n.split(chunk), strict=True):
            logits_cv = capped(hidden_ch @ head_vh.t(), softcap)
            hits.append(logits_cv.argmax(-1) == targets_c)
            logprobs.append(logprob_of(logits_cv, targets_c))
    if not logprobs:
        return wide(hidden_nh).new_zeros(0), torch.zeros(0, dtype=torch.bool, device=hidden_nh.device)
    return torch.cat(logprobs), torch.cat(hits)


def logprob_of(logits_cv: torch.Tensor, targets_c: torch.Tensor) -> torch.Tensor:
    """[c] log softmax at the targets, in fp32 (fp64)."""
    return -torch.nn.functional.cross_entropy(wide(logits_cv), targets_c, reduction="none")


def capped(logits_cv: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits under Gemma 2's bound."""
    return logits_cv if softcap is None else softcap * torch.tanh(logits_cv / softcap)


def logprob_and_residual(logits_cv: torch.Tensor, targets_c: torch.Tensor) -> torch.Tensor:
    """[c] log-probabilities; ``logits_cv`` becomes onehot - softmax, the gradient of each with its logits."""
    if fused(logits_cv):
        from luthier.kernels.gpu import logprob as gpu

        return gpu.logprob_and_residual(logits_cv, targets_c)
    rows = torch.arange(len(targets_c), device=targets_c.device)
    wide_cv = wide(logits_cv)
    lse_c = torch.logsumexp(wide_cv, -1)
    logprob_c = wide_cv[rows, targets_c] - lse_c
    residual_cv = torch.exp(wide_cv - lse_c[:, None]).neg_()
    residual_cv[rows, targets_c] += 1
    logits_cv.copy_(residual_cv)
    return logprob_c


class _SelectedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: torch.Tensor,
        head_vh: torch.Tensor,
        targets_n: torch.Tensor,
        chunk: int,
        softcap: float | None,
    ) -> torch.Tensor:
        ctx.chunk, ctx.softcap = chunk, softcap
        whole = head_vh.requires_grad  # the head's gradient sums over rows, after they are scaled: made in backward
        wanted = hidden_nh.requires_grad and not whole
        slope_nh = torch.empty_like(hidden_nh) if wanted else None
        logprob_n = torch.empty(len(targets_n), dtype=wide(hidden_nh[:0]).dtype, device=hidden_nh.device)
        for start in range(0, len(targets_n), chunk):
            part = slice(start, start + chunk)
            logits_cv, cap_slope = _logits(hidden_nh[part], head_vh, softcap)
            if slope_nh is None:
                logprob_n[part] = logprob_of(logits_cv, targets_n[part])
                continue
            logprob_n[part] = logprob_and_residual(logits_cv, targets_n[part])
            if cap_slope is not None:
                logits_cv *= cap_slope
            torch.mm(logits_cv, head_vh, out=slope_nh[part])
        if whole:
            ctx.save_for_backward(hidden_nh, head_vh, targets_n)
        else:
            ctx.save_for_backward(slope_nh)
        ctx.whole = whole
        return logprob_n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_n,) = grads
        if not ctx.whole:
            (slope_nh,) = ctx.saved_tensors
            return (slope_nh * grad_n[:, None]).to(slope_nh.dtype), None, None, None, None
        hidden_nh, head_vh, targets_n = ctx.saved_tensors
        hidden_grad, head_grad = torch.empty_like(hidden_nh), torch.zeros_like(head_vh)
        for start in range(0, len(targets_n), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_cv, cap_slope = _logits(hidden_nh[part], head_vh, ctx.softcap)
            logprob_and_residual(logits_cv, targets_n[part])
            if cap_slope is not None:
                logits_cv *= cap_slope
            logits_cv *= grad_n[part, None]
            torch.mm(logits_cv, head_vh, out=hidden_grad[part])
            head_grad.addmm_(logits_cv.t(), hidden_nh[part])
        return hidden_grad, head_grad, None, None, None


def _logits(
    hidden_ch: torch.Tensor, head_vh: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[c, v] logits, and the slope of the cap where there is one."""
    logits_cv = hidden_ch @ head_vh.t()
    if softcap is None:
        return logits_cv, None
    tanh_cv = torch.tanh(logits_cv / softcap)
    return softcap * tanh_cv, 1 - tanh_cv.square()
