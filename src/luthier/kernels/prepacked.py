"""A matrix laid out as oneDNN multiplies with it: short products on a CPU then take half the time and less.

A product of a few rows rearranges the whole matrix first; laid out beforehand, that is done once. The operators are
those that torch's own compiler uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from luthier.kernels.glu import gated
from luthier.kernels.host import normed
from luthier.kernels.linear import Linear, Norm

ROWS = 16  # the number of rows that the layout is chosen for; it serves any


class Multiplier(Protocol):
    """A matrix that multiplies by itself, wherever and however its weights lie."""

    def times(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[t, out] from x [t, in], bias [out] and residual [t, out] added when given."""
        ...


@dataclass(frozen=True, slots=True)
class Prepacked:
    """A weight [out, in], and the same in oneDNN's layout."""

    weight: torch.Tensor
    packed: torch.Tensor
    parameter: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """The weight as it is."""
        return self.weight

    def times(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[t, out] from x [t, in], with ``residual`` [t, out] added when given."""
        own = None if bias is None else bias.to(x.dtype)
        if residual is None:
            return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, own, "none", [], ""))
        added = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, own, "add")
        return cast(torch.Tensor, added)


def prepacked(weight: torch.Tensor) -> Prepacked | None:
    """The weight prepacked; None where this torch or this CPU does not do so."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        made = Prepacked(weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))
        made.times(weight.new_zeros(1, weight.shape[1]), residual=weight.new_zeros(1, len(weight)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return made


def inferred(
    op: Linear,
    matrix: Multiplier,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor, Norm], torch.Tensor] = normed,
) -> torch.Tensor:
    """What `Linear.inferred` computes, by a matrix that multiplies by itself. ``norm``: how RMSNorm is computed."""
    if op.norm is not None:
        x = norm(x, op.norm)
    elif op.gate is not None:
        x = gated(x, op.gate)
    out = matrix.times(x, op.bias, residual)
    if op.update is not None:
        inner_tr = x @ op.update.a_rh.t()
        for part, b in zip(op.update.parts, op.update.b, strict=True):
            out[:, part.rows].addmm_(inner_tr[:, part.ranks], b.t(), alpha=part.scale)
    return out
