"""Training on a CPU: what `linear`, `attention` and `logprob` compute, in fewer and cheaper operations.

On a CPU that multiplies matrices in 16 bit, a step's time goes into everything around its products. So what is cheap to
keep is kept, what takes several operations is put to one that torch has, and the shapes of products come again and
again: its libraries compile each of them once.

Names: ``t`` tokens, ``h`` hidden, ``o`` what leaves a product, ``n`` chosen tokens, ``v`` vocabulary, ``b`` rows of a
group, ``l`` their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch

from luthier.data.pack import alike
from luthier.kernels import linear
from luthier.kernels.attention import Spans
from luthier.kernels.backend import fused, wide
from luthier.kernels.linear import Linear

DEEP = 2048  # a product that sums over more is made in two halves: the library gives it to one core otherwise
LONGEST = 512  # keys; torch's own kernel takes longer rows
ROWS = 16  # of logits whose softmax is made at a time: they stay in the cache

Grads = tuple[torch.Tensor | None, ...]


# ------------------------------------------------------------------------------------------------------ products


def serves(op: Linear, x: torch.Tensor) -> bool:
    """Whether `product` may stand for the product: on a CPU, with nothing but its low-rank update trained."""
    frozen = (op.matrix.parameter, op.bias, None if op.norm is None else op.norm.weight)
    return on_host(x) and not any(one is not None and one.requires_grad for one in frozen)


def on_host(x: torch.Tensor) -> bool:
    """Whether an operation on ``x`` runs on a CPU, and not in Triton's interpreter."""
    return x.device.type == "cpu" and not fused(x)


def product(
    op: Linear, x: torch.Tensor, key_t: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Linear.with_input` gives."""
    made = _Product.apply(op, x, key_t, residual, *op.masters)  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, torch.Tensor], made)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: Linear,
        x: torch.Tensor,
        key_t: torch.Tensor | None,
        residual: torch.Tensor | None,
        *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        entered, helper = x, None  # the norm's reciprocal root mean squares, or the gate's activation
        if op.norm is not None:
            entered, helper = rms_norm(x, op.norm.weight, op.norm.eps, op.norm.offset)
        elif op.gate is not None:
            entered, helper = _gated(op, x)
        out = linear._multiply(entered, op.matrix.get(), op.bias, residual)
        inner_tr = None if op.update is None else linear._add_update(out, entered, op.update, key_t)
        ctx.op = op
        kept = entered if op.norm is not None and op.update is not None else None
        ctx.save_for_backward(x, key_t, helper, inner_tr, kept)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        op: Linear = ctx.op
        x, key_t, helper, inner_tr, kept = ctx.saved_tensors
        grad_to, passed_grad = grads[0].contiguous(), grads[1]
        needs_x, needs_residual = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        entered_grad = _times(grad_to, op.matrix.get()) if needs_x else None
        grads_ab: list[torch.Tensor] = []
        if op.update is not None:
            inner_grad = linear._inner_grad(grad_to, op.update)
            if entered_grad is not None:
                linear._add_inner(entered_grad, inner_grad, op.update, key_t)
            entered = x if kept is None else kept
            if op.gate is not None:
                entered = helper * x.chunk(2, -1)[1]
            grads_ab = linear._master_grads(grad_to, entered, inner_tr, inner_grad, op.update, key_t)
        grad_x = None if entered_grad is None else _leave(op, x, helper, entered_grad, passed_grad)
        return None, grad_x, None, grad_to if needs_residual else None, *grads_ab


def _gated(op: Linear, x_tf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated activation, and that of the gate alone."""
    gate_tf, up_tf = x_tf.chunk(2, -1)
    act = torch.nn.functional
    act_tf = act.silu(gate_tf) if op.gate == "silu" else act.gelu(gate_tf, approximate="tanh")
    return act_tf * up_tf, act_tf


def _leave(
    op: Linear, x: torch.Tensor, helper: torch.Tensor, grad: torch.Tensor, passed_grad: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of what comes before the norm or the gate, that of the residual path added."""
    if op.norm is not None:
        return _norm_backward(grad, x, op.norm.weight, helper, op.norm.offset, passed_grad)
    if op.gate is not None:
        gate_tf, up_tf = x.chunk(2, -1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, -1)
        torch.mul(grad, helper, out=up_grad)
        grad.mul_(up_tf)
        if op.gate == "silu":
            torch.ops.aten.silu_backward(grad, gate_tf, grad_input=gate_grad)
        else:
            torch.ops.aten.gelu_backward(grad, gate_tf, approximate="tanh", grad_input=gate_grad)
        grad = out
    return grad if passed_grad is None else grad.add_(passed_grad)


def _times(grad_to: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[t, in] from the gradient of what left the product."""
    size = len(matrix)
    if size <= DEEP or matrix.element_size() != 2:
        return grad_to @ matrix
    half = size // 2
    return (grad_to[:, :half] @ matrix[:half]).addmm_(grad_to[:, half:], matrix[half:])


# --------------------------------------------------------------------------------------------------------- norms


def rms_norm(
    x_th: torch.Tensor, weight_h: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `norm.rms_norm` gives, rounded once."""
    wide_th = wide(x_th)
    rstd_t = torch.linalg.vecdot(wide_th, wide_th).div_(x_th.shape[-1]).add_(eps).rsqrt_()
    out = wide_th * rstd_t[:, None]
    return out.mul_(wide(weight_h) + offset if offset else wide(weight_h)).to(x_th.dtype), rstd_t


def _norm_backward(
    grad_th: torch.Tensor,
    x_th: torch.Tensor,
    weight_h: torch.Tensor,
    rstd_t: torch.Tensor,
    offset: float,
    passed_grad: torch.Tensor | None,
) -> torch.Tensor:
    """What `norm.rms_norm_backward` gives.

    torch's kernel for LayerNorm, told that the mean is 0, subtracts rstd * mean(weight * grad) beside what RMSNorm
    does: that is added again.
    """
    scale_h = wide(weight_h) + offset
    mean_t = torch.mv(grad_th, scale_h.to(grad_th.dtype)).mul_(rstd_t).div_(x_th.shape[-1])
    out_th: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
        grad_th, x_th, x_th.shape[-1:], torch.zeros_like(rstd_t)[:, None], rstd_t[:, None], scale_h, None,
        [True, False, False],
    )[0]  # fmt: skip
    out_th += mean_t[:, None]
    return out_th if passed_grad is None else out_th.add_(passed_grad)


# ----------------------------------------------------------------------------------------------------- attention


def attends(x: torch.Tensor, where: Spans, half: int, head_dim: int, softcap: float | None) -> bool:
    """Whether `attention` may stand for rotation and attention: short rows in 16 bit (fp64 is for references)."""
    short = where.gather is None and where.longest <= LONGEST
    return on_host(x) and short and x.dtype != torch.float32 and 2 * half == head_dim and softcap is None


def attention(
    qkv_to: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    where: Spans,
    heads: int,
    kv_heads: int,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[t, heads d]: rotation as of `rotary.rotate` and attention as of `attention.attend`, of the fused product.

    ``turn``: cosines and sines [t, half of d].
    """
    return cast(torch.Tensor, _Attention.apply(qkv_to, *turn, where, heads, kv_heads, scale, window))  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """The queries that share a key head lie one after another, as if they were more tokens: nothing is repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_to: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        where: Spans,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        tokens, each = len(qkv_to), heads // kv_heads
        all_tnd = qkv_to.view(tokens, heads + 2 * kv_heads, -1)
        width = all_tnd.shape[-1]
        turned = _turn(all_tnd[:, : heads + kv_heads], cos, sin)
        out = qkv_to.new_empty(tokens, heads, width)
        saved = []
        for rows, length in _groups(where.queries):
            q = _laid(turned[:, :heads], rows, length).view(-1, each * length, width)
            k = _laid(turned[:, heads:], rows, length).view(-1, length, width)
            v = _laid(all_tnd[:, heads + kv_heads :], rows, length).view(-1, length, width)
            mask = _mask(where, length, window, q).repeat(each, 1).expand(len(q), -1, -1)
            weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
            made = torch.bmm(weights, v).view(len(rows), heads, length, width)
            _unlaid(made, rows, out)
            saved += [q, k, v, weights]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.where, ctx.heads, ctx.kv_heads, ctx.scale = where, heads, kv_heads, scale
        return out.view(tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        cos, sin, *saved = ctx.saved_tensors
        heads, kv_heads = ctx.heads, ctx.kv_heads
        grad_tnd = grads[0].view(len(grads[0]), heads, -1)
        width = grad_tnd.shape[-1]
        out = grad_tnd.new_empty(len(grad_tnd), heads + 2 * kv_heads, width)
        for place, (rows, length) in enumerate(_groups(ctx.where.queries)):
            q, k, v, weights = saved[4 * place : 4 * place + 4]
            grad = _laid(grad_tnd, rows, length).view_as(q)
            grad_v = torch.bmm(weights.transpose(1, 2), grad)
            slope = torch.ops.aten._softmax_backward_data(
                torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype
            )
            grad_q = torch.baddbmm(q, slope, k, beta=0, alpha=ctx.scale)
            grad_k = torch.baddbmm(k, slope.transpose(1, 2), q, beta=0, alpha=ctx.scale)
            for made, first in ((grad_q, 0), (grad_k, heads), (grad_v, heads + kv_heads)):
                laid = made.view(len(rows), -1, length, width)
                _unlaid(laid, rows, out[:, first : first + laid.shape[1]])
            del q, k, v, weights, grad, slope, grad_q, grad_k, grad_v, made, laid
        both = out[:, : heads + kv_heads]
        both.copy_(_turn(both, cos, -sin))
        return out.view(len(out), -1), None, None, None, None, None, None, None


def _turn(x_tnd: torch.Tensor, cos_td: torch.Tensor, sin_td: torch.Tensor) -> torch.Tensor:
    """Rotated, in fp32 (fp64): it is rounded where it is laid out."""
    half = cos_td.shape[-1]
    cos, sin, plain = cos_td[:, None], sin_td[:, None], wide(x_tnd)
    out = plain * torch.cat([cos, cos], -1)
    out[..., :half].addcmul_(plain[..., half:], sin, value=-1)
    out[..., half:].addcmul_(plain[..., :half], sin)
    return out.to(x_tnd.dtype)


def _groups(lengths: Sequence[int]) -> list[tuple[list[tuple[int, int]], int]]:
    """(First token, past the last) of the rows of each group, and the length that they are padded to."""
    stops = list(accumulate(lengths))
    starts = [0, *stops]
    return [([(starts[i], stops[i]) for i in own], length) for own, length in alike(lengths)]


def _laid(x_tnd: torch.Tensor, rows: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
    """[b, heads, l, d] of some rows, zeros at the end of each."""
    out = x_tnd.new_zeros(len(rows), x_tnd.shape[1], length, x_tnd.shape[2])
    for place, (start, stop) in enumerate(rows):
        out[place, :, : stop - start].copy_(x_tnd[start:stop].transpose(0, 1))
    return out


def _unlaid(x_bnld: torch.Tensor, rows: Sequence[tuple[int, int]], out_tnd: torch.Tensor) -> None:
    for place, (start, stop) in enumerate(rows):
        out_tnd[start:stop].copy_(x_bnld[place, :, : stop - start].transpose(0, 1))


def _mask(where: Spans, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[l, l] that is added to scores; all layers share it. Padding lies in the future of all that count."""
    key = -length, window  # `attend` counts groups from 0
    if key not in where.masks:
        seen = torch.ones(length, length, dtype=torch.bool).tril_()
        if window is not None:
            seen.triu_(1 - window)
        where.masks[key] = torch.zeros(length, length, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
    return cast(torch.Tensor, where.masks[key])


# ---------------------------------------------------------------------------------------------------------- loss


def scores(hidden_nh: torch.Tensor, head_vh: torch.Tensor, softcap: float | None) -> bool:
    """Whether `selected_logprob` may stand for that of `logprob`: with gradient, of a head that has none."""
    return on_host(hidden_nh) and hidden_nh.requires_grad and not head_vh.requires_grad and softcap is None


def selected_logprob(
    hidden_nh: torch.Tensor, head_vh: torch.Tensor, targets_n: torch.Tensor, *, chunk: int
) -> torch.Tensor:
    """What `logprob.selected_logprob` gives where the head is frozen and has no bound."""
    return cast(torch.Tensor, _SelectedLogprob.apply(hidden_nh, head_vh, targets_n, chunk))  # type: ignore[no-untyped-call]


class _SelectedLogprob(torch.autograd.Function):
    """The gradient of log p(y) is W_y - W^T softmax(z): the product is of the exponentials, its rows are divided."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nh: torch.Tensor, head_vh: torch.Tensor, targets_n: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        logprob_n = torch.empty(len(targets_n), dtype=wide(hidden_nh[:0]).dtype)
        slope_nh = torch.empty_like(hidden_nh)
        for start in range(0, len(targets_n), chunk):
            part = slice(start, start + chunk)
            logprob_n[part], slope_nh[part] = _scored(hidden_nh[part], head_vh, targets_n[part])
        ctx.save_for_backward(slope_nh)
        return logprob_n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        (slope_nh,) = ctx.saved_tensors
        return (slope_nh * grads[0][:, None]).to(slope_nh.dtype), None, None, None


def _scored(
    hidden_ch: torch.Tensor, head_vh: torch.Tensor, targets_c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[c] log-probabilities, [c, h] the slope of each; the logits are gone when it returns."""
    logits_cv = hidden_ch @ head_vh.t()
    found_c = wide(logits_cv.gather(1, targets_c[:, None])[:, 0])
    most_c1 = wide(logits_cv.amax(-1, keepdim=True))
    sums = []
    for rows_rv, most_r1 in zip(logits_cv.split(ROWS), most_c1.split(ROWS), strict=True):
        exp_rv = (wide(rows_rv) - most_r1).exp_()
        sums.append(exp_rv.sum(-1))
        rows_rv.copy_(exp_rv)
    sum_c = torch.cat(sums)
    slope_ch = wide(head_vh[targets_c]) - wide(logits_cv @ head_vh).div_(sum_c[:, None])
    return found_c - most_c1[:, 0] - sum_c.log(), slope_ch
