"""An optimizer whose state waits in host memory: for a few weights at a time it comes to the device and goes back.

The update itself is the device's own, so it is the same to the bit; what it costs is the way there and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from luthier.plan.memory import UPDATED


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Let ``optimizer`` keep its state on the host from now on; also what `load_state_dict` gives it."""
    plain_step, plain_load = optimizer.step, optimizer.load_state_dict
    homes: dict[tuple[torch.Tensor, str], torch.Tensor] = {}  # where each tensor of the state waits

    def step(*arguments: Any, **named: Any) -> None:
        weights = [weight for weight in _weights(optimizer) if weight.grad is not None]
        grads = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        for piece in _pieces(weights):
            for at in piece:
                weights[at].grad = grads[at]
                _come(optimizer.state.get(weights[at], {}), weights[at])
            plain_step(*arguments, **named)
            for at in piece:
                weights[at].grad = None
                _go(optimizer.state[weights[at]], weights[at], homes)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        if any(weight.is_cuda for weight in weights):  # a checkpoint may read the state next
            torch.cuda.current_stream(weights[0].device).synchronize()

    def load(found: dict[str, Any]) -> None:
        plain_load({**found, "state": {}})  # torch would bring all of it to the device
        for number, weight in enumerate(_weights(optimizer)):
            if number in found["state"]:
                own = optimizer.state[weight]
                own.update(found["state"][number])
                _go(own, weight, homes)
                for name, value in _tensors(own, single=True):
                    own[name] = value.to(weight.device if weight.is_cuda else value.device)

    optimizer.step = step  # type: ignore[method-assign,assignment]
    optimizer.load_state_dict = load  # type: ignore[method-assign,assignment]


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _pieces(weights: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Their indices, so many together as weigh `UPDATED` bytes, at least one."""
    piece: list[int] = []
    held = 0
    for at, weight in enumerate(weights):
        if piece and held + weight.nbytes > UPDATED:
            yield piece
            piece, held = [], 0
        piece.append(at)
        held += weight.nbytes
    if piece:
        yield piece


def _tensors(state: dict[str, Any], *, single: bool = False) -> list[tuple[str, torch.Tensor]]:
    """What is worth moving; or the ``single`` numbers, such as that of the step."""
    found = [(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)]
    return [(name, value) for name, value in found if (value.ndim == 0) == single]


def _come(state: dict[str, Any], weight: torch.Tensor) -> None:
    for name, value in _tensors(state):
        state[name] = value.to(weight.device, non_blocking=True, copy=True)


def _go(state: dict[str, Any], weight: torch.Tensor, homes: dict[tuple[torch.Tensor, str], torch.Tensor]) -> None:
    for name, value in _tensors(state):
        home = homes.get((weight, name))
        if home is None:
            home = homes[weight, name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=weight.is_cuda)
        state[name] = home.copy_(value, non_blocking=True)
