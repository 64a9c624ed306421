"""The gated activation of the feed-forward layer: act(gate) * up, and its gradient (Shazeer 2020)."""

from __future__ import annotations

from typing import Literal

import torch

from luthier.kernels.backend import fused

Activation = Literal["silu", "gelu_tanh"]


def gated(gate_up_tf: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[t, f] from the fused [t, 2 f]: the first half is the gate."""
    if fused(gate_up_tf):
        from luthier.kernels.gpu import glu as gpu

        return gpu.gated(gate_up_tf, activation)
    gate_tf, up_tf = gate_up_tf.chunk(2, -1)
    return _act(gate_tf, activation) * up_tf


def gated_backward(
    grad_tf: torch.Tensor, gate_up_tf: torch.Tensor, activation: Activation, again: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[t, 2 f] gradient of the fused product; with ``again`` also [t, f], what `gated` gave."""
    if fused(gate_up_tf):
        from luthier.kernels.gpu import glu as gpu

        return gpu.gated_backward(grad_tf, gate_up_tf, activation, again)
    gate_tf, up_tf = gate_up_tf.chunk(2, -1)
    act_tf = _act(gate_tf, activation)
    out_tf = torch.empty_like(gate_up_tf)
    gate_grad, up_grad = out_tf.chunk(2, -1)
    gate_grad.copy_(_act_backward(grad_tf * up_tf, gate_tf, activation))
    torch.mul(grad_tf, act_tf, out=up_grad)
    return out_tf, act_tf * up_tf if again else None


def _act(gate_tf: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate_tf)
    return torch.nn.functional.gelu(gate_tf, approximate="tanh")


def _act_backward(grad_tf: torch.Tensor, gate_tf: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_tf, gate_tf)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu_backward(grad_tf, gate_tf, approximate="tanh")  # type: ignore[no-any-return]
