"""Matrix products of a decoder layer with what surrounds them, each one node of the autograd graph.

    x -> RMSNorm or gate (or nothing) -> times the matrix, plus bias -> plus low-rank update -> plus residual

Norms and gates are computed again in the backward pass instead of being kept. The frozen matrix is asked for when it is
needed, in the forward and again in the backward pass, so it may lie in 4 bits or on the host in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from luthier.kernels.glu import Activation, gated, gated_backward
from luthier.kernels.keyed import dropout
from luthier.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad


class Matrix(Protocol):
    """A weight [out, in] wherever it lies."""

    @property
    def parameter(self) -> torch.Tensor | None:
        """The weight itself where it is trained."""
        ...

    def get(self) -> torch.Tensor:
        """It in the compute type on the compute device; valid until another matrix is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """The low-rank update of some rows of a matrix: ``scale`` * B A, with dropout ``p`` on what enters A."""

    rows: slice
    ranks: slice  # its rows in the concatenated A
    scale: float
    p: float = 0.0
    salt: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """Low-rank updates of one matrix in the compute type: A of all parts [r, in], and each part's B [out, r]."""

    parts: tuple[Part, ...]
    a_rh: torch.Tensor
    b: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm before the product."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Linear:
    """One product: the matrix and everything around it. ``update`` and ``masters`` (A, B of each part) go together."""

    matrix: Matrix
    bias: torch.Tensor | None = None
    norm: Norm | None = None
    gate: Activation | None = None
    update: Update | None = None
    masters: tuple[torch.Tensor, ...] = ()

    def __call__(
        self, x: torch.Tensor, key_t: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[t, out] from x [t, in] ([t, 2 in] with a gate), with ``residual`` [t, out] added when given."""
        return self.with_input(x, key_t, residual)[0]

    def with_input(
        self, x: torch.Tensor, key_t: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product, and x for the residual path: its gradient then joins the norm's in one kernel."""
        weight = None if self.norm is None else self.norm.weight
        made = _Product.apply(  # type: ignore[no-untyped-call]
            self, x, key_t, residual, weight, self.bias, self.matrix.parameter, *self.masters
        )
        return cast(tuple[torch.Tensor, torch.Tensor], made)

    def inferred(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, beside: torch.cuda.Stream | None = None
    ) -> torch.Tensor:
        """The product without a trace for gradients and without dropout: what generation calls a thousand times.

        ``beside``: a stream on which the low-rank update's first factor runs while the matrix is read.
        """
        entered, _ = _enter(self, x)
        if self.update is None:
            return _multiply(entered, self.matrix.get(), self.bias, residual)
        if beside is None:
            out = _multiply(entered, self.matrix.get(), self.bias, residual)
            _add_update(out, entered, self.update, None)
            return out
        beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(beside):
            inner_tr = _inner(entered, self.update, None)
        out = _multiply(entered, self.matrix.get(), self.bias, residual)
        torch.cuda.current_stream(x.device).wait_stream(beside)
        _add_outer(out, inner_tr, self.update)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: Linear,
        x: torch.Tensor,
        key_t: torch.Tensor | None,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        parameter: torch.Tensor | None,
        *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)  # an input nobody uses again has no gradient, not a tensor of zeros
        entered, rstd_t = _enter(op, x)
        out = _multiply(entered, op.matrix.get(), bias, residual)
        inner_tr = None if op.update is None else _add_update(out, entered, op.update, key_t)
        ctx.op, ctx.has_residual = op, residual is not None
        ctx.save_for_backward(x, key_t, rstd_t, inner_tr)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op: Linear = ctx.op
        x, key_t, rstd_t, inner_tr = ctx.saved_tensors
        grad_to, passed_grad = grads[0].contiguous(), grads[1]
        _, needs_x, _, needs_residual, needs_norm, needs_bias, needs_matrix, *_ = ctx.needs_input_grad

        entered_grad = grad_to @ op.matrix.get() if needs_x or needs_norm else None
        inner_grad = None
        if op.update is not None:
            inner_grad = _inner_grad(grad_to, op.update)
            if entered_grad is not None:
                _add_inner(entered_grad, inner_grad, op.update, key_t)
        grad_x, entered = _leave(op, x, rstd_t, entered_grad, passed_grad, op.update is not None or needs_matrix)

        grads_ab: list[torch.Tensor] = []
        if op.update is not None and inner_grad is not None and entered is not None:
            grads_ab = _master_grads(grad_to, entered, inner_tr, inner_grad, op.update, key_t)
        grad_norm = None
        if needs_norm and entered_grad is not None and rstd_t is not None:
            grad_norm = rms_norm_weight_grad(entered_grad, x, rstd_t)
        return (
            None,
            grad_x if needs_x else None,
            None,
            grad_to if needs_residual else None,
            grad_norm,
            grad_to.sum(0) if needs_bias else None,
            grad_to.t() @ entered if needs_matrix and entered is not None else None,
            *grads_ab,
        )


# ------------------------------------------------------------------------------------- what enters the matrix


def _enter(op: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """X after the norm or the gate, and the norm's reciprocal root mean squares."""
    if op.norm is not None:
        return rms_norm(x, op.norm.weight, op.norm.eps, op.norm.offset)
    if op.gate is not None:
        return gated(x, op.gate), None
    return x, None


def _leave(
    op: Linear,
    x: torch.Tensor,
    rstd_t: torch.Tensor | None,
    entered_grad: torch.Tensor | None,
    passed_grad: torch.Tensor | None,
    wants_entered: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient of x, and what entered the matrix again where a gradient of the matrix or its update needs it."""
    if op.norm is not None:
        entered = rms_norm(x, op.norm.weight, op.norm.eps, op.norm.offset)[0] if wants_entered else None
        if entered_grad is None or rstd_t is None:
            return None, entered
        return rms_norm_backward(entered_grad, x, op.norm.weight, rstd_t, op.norm.offset, passed_grad), entered
    if op.gate is not None:
        if entered_grad is None:
            return None, gated(x, op.gate)
        grad_x, gated_again = gated_backward(entered_grad, x, op.gate, wants_entered)
        return grad_x if passed_grad is None else grad_x + passed_grad, gated_again
    if entered_grad is None or passed_grad is None:
        return entered_grad, x
    return entered_grad + passed_grad, x


def _multiply(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    if residual is not None:
        out = torch.addmm(residual, x, matrix.t())
        return out if bias is None else out.add_(bias.to(out.dtype))
    return x @ matrix.t() if bias is None else torch.addmm(bias.to(x.dtype), x, matrix.t())


# ---------------------------------------------------------------------------------------- the low-rank update


def _add_update(out_to: torch.Tensor, x: torch.Tensor, update: Update, key_t: torch.Tensor | None) -> torch.Tensor:
    """Add scale * B A x to the rows of each part, in place; gives A x [t, r] back."""
    inner_tr = _inner(x, update, key_t)
    _add_outer(out_to, inner_tr, update)
    return inner_tr


def _add_outer(out_to: torch.Tensor, inner_tr: torch.Tensor, update: Update) -> None:
    for part, b in zip(update.parts, update.b, strict=True):
        out_to[:, part.rows].addmm_(inner_tr[:, part.ranks], b.t(), alpha=part.scale)


def _inner(x: torch.Tensor, update: Update, key_t: torch.Tensor | None) -> torch.Tensor:
    if not any(part.p for part in update.parts):
        return x @ update.a_rh.t()
    inner_tr = x.new_empty(len(x), len(update.a_rh))
    for part in update.parts:
        inner_tr[:, part.ranks] = _dropped(x, part, key_t) @ update.a_rh[part.ranks].t()
    return inner_tr


def _inner_grad(grad_to: torch.Tensor, update: Update) -> torch.Tensor:
    """[t, r] gradient of A x."""
    inner_grad = grad_to.new_empty(len(grad_to), len(update.a_rh))
    for part, b in zip(update.parts, update.b, strict=True):
        inner_grad[:, part.ranks].addmm_(grad_to[:, part.rows], b, beta=0, alpha=part.scale)
    return inner_grad


def _add_inner(x_grad: torch.Tensor, inner_grad: torch.Tensor, update: Update, key_t: torch.Tensor | None) -> None:
    """Add the gradient that reaches x through A, in place."""
    if not any(part.p for part in update.parts):
        x_grad.addmm_(inner_grad, update.a_rh)
        return
    for part in update.parts:
        x_grad += _dropped(inner_grad[:, part.ranks] @ update.a_rh[part.ranks], part, key_t)


def _master_grads(
    grad_to: torch.Tensor,
    x: torch.Tensor,
    inner_tr: torch.Tensor,
    inner_grad: torch.Tensor,
    update: Update,
    key_t: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of A and B of each part, in turn."""
    whole = _summed(inner_grad.t(), x) if not any(part.p for part in update.parts) else None
    out: list[torch.Tensor] = []
    for part in update.parts:
        own = _summed(inner_grad[:, part.ranks].t(), _dropped(x, part, key_t)) if whole is None else whole[part.ranks]
        out += [own, _summed(grad_to[:, part.rows].t(), inner_tr[:, part.ranks]).mul_(part.scale)]
    return out


def _summed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A b in the type of the masters: a GPU sums 16-bit products in fp32 anyway, and need not round that."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _dropped(x: torch.Tensor, part: Part, key_t: torch.Tensor | None) -> torch.Tensor:
    if not part.p or key_t is None:  # no key: evaluation
        return x
    return dropout(x, key_t, part.salt, part.p)
