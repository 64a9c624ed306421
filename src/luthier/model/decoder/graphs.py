"""All layers but the last as CUDA graphs, one for each length of a pass: it then costs the host almost nothing.

The kernels of a pass depend on its shapes alone, and passes come padded to few lengths (`plan.passes.padded`).
The last layer and the loss depend on which tokens are supervised; they stay outside. All graphs share one memory pool
and the tensors that they read and write: a pass runs forwards and backwards before the next, so that a further length
costs no memory. A graph also has room for a number of samples and for a longest one; that of a later graph is never
less, so that few graphs are made twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch

from luthier.kernels.attention import Spans
from luthier.model.decoder.layer import Layer, Pass

if TYPE_CHECKING:
    from luthier.model.decoder.shape import Rotary

Key = tuple[int, bool]  # tokens; whether there are keys for dropout
LONGEST = 128  # tokens that a sample may have at least


@dataclass(frozen=True)
class _Tensors:
    """What the graphs of all lengths read and write, each the beginning of it."""

    entered: torch.Tensor
    left: torch.Tensor
    left_grad: torch.Tensor
    turns: dict[Rotary, tuple[torch.Tensor, torch.Tensor]]
    key_t: torch.Tensor

    @classmethod
    def like(cls, x_th: torch.Tensor, now: Pass, tokens: int) -> _Tensors:
        """Those for passes of up to ``tokens``."""
        entered, left, left_grad = (x_th.new_zeros(tokens, x_th.shape[1]) for _ in range(3))
        turns = {
            kind: (cos.new_zeros(tokens, cos.shape[1]), sin.new_zeros(tokens, sin.shape[1]))
            for kind, (cos, sin) in now.turns.items()
        }
        return cls(entered, left, left_grad, turns, torch.zeros(tokens, dtype=torch.int64, device=x_th.device))


@dataclass
class _Captured:
    """A graph pair and the tensors that it reads and writes."""

    now: Pass
    entered: torch.Tensor
    left: torch.Tensor
    left_grad: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph

    def holds(self, spans: Spans) -> bool:
        """Whether it has room for these samples."""
        return len(spans.queries) <= len(self.now.spans.queries) and spans.longest <= self.now.spans.longest


class Graphs:
    """The graphs of one model, made as lengths are met."""

    def __init__(self, layers: Sequence[Layer], device: torch.device, largest: int = 0) -> None:
        """``layers``: those that become graphs; what they train are adapters alone (fp32).

        ``largest``: the length of the largest pass that will come.
        """
        self.layers, self.device, self.largest = list(layers), device, largest
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        self._found: dict[Key, _Captured] = {}
        self._samples, self._longest = 1, LONGEST  # the room of the next graph
        self._tensors: _Tensors | None = None
        self._pool: Any = None
        total = sum(parameter.numel() for parameter in self.parameters)
        self._flat = torch.zeros(total, dtype=self.parameters[0].dtype, device=device)
        views = self._flat.split([parameter.numel() for parameter in self.parameters])
        self._grads = [view.view_as(p) for view, p in zip(views, self.parameters, strict=True)]

    def __call__(self, x_th: torch.Tensor, now: Pass) -> torch.Tensor:
        """run(x, now), by the graph of its length. The gradients of the parameters are added in the backward pass."""
        captured = self._for(x_th, now)
        return cast(torch.Tensor, _Replayed.apply(self, captured, x_th, now, self.parameters[0]))  # type: ignore[no-untyped-call]

    def put(self, captured: _Captured, x_th: torch.Tensor, now: Pass) -> None:
        """Lay a pass into the tensors that its graph reads."""
        own = captured.now
        captured.entered.copy_(x_th)
        for kind, (cos, sin) in now.turns.items():
            own.turns[kind][0].copy_(cos)
            own.turns[kind][1].copy_(sin)
        starts = _starts(now.spans, len(own.spans.starts_q))
        own.spans.starts_q.copy_(starts, non_blocking=True)  # staged at once: the host does not wait for the device
        if own.key_t is not None and now.key_t is not None:
            own.key_t.copy_(now.key_t)

    def collect(self) -> None:
        """Make the gradients that graphs add to those of the parameters, keeping what the step has gathered so far."""
        first = self.parameters[0].grad
        if first is None:
            self._flat.zero_()  # a step begins
        elif first is not self._grads[0]:  # an earlier pass of the step ran without a graph
            torch._foreach_copy_(self._grads, [cast(torch.Tensor, parameter.grad) for parameter in self.parameters])
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad

    def _for(self, x_th: torch.Tensor, now: Pass) -> _Captured:
        tokens = len(x_th)
        key = (tokens, now.key_t is not None)
        found = self._found.get(key)
        if found is None or not found.holds(now.spans):
            self._samples = max(self._samples, 1 << (len(now.spans.queries) - 1).bit_length())
            self._longest = max(self._longest, 1 << (now.spans.longest - 1).bit_length())
            if not self._found and self.largest > tokens:  # its blocks of memory are large enough for all others
                self._found[self.largest, key[1]] = self._capture(self.largest, x_th, now)
            found = self._found[key] = self._capture(tokens, x_th, now)
        return found

    def _capture(self, tokens: int, x_th: torch.Tensor, now: Pass) -> _Captured:
        tensors = self._tensors
        if tensors is None or len(tensors.entered) < tokens:
            tensors = self._tensors = _Tensors.like(x_th, now, max(tokens, self.largest))
        own, entered = self._room(tensors, tokens, now), tensors.entered[:tokens]
        left, left_grad = tensors.left[:tokens], tensors.left_grad[:tokens]
        torch.cuda.synchronize(self.device)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        recorded = torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local")
        with torch.enable_grad(), recorded, self._stand_ins() as parameters:
            x = entered
            for layer in self.layers:
                x = layer(x, own)
            left.copy_(x.detach())  # what the pool holds is another pass's before long
        self._pool = self._pool or forward.pool()
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            grads = torch.autograd.grad(x, parameters, left_grad)
            torch._foreach_add_(self._grads, grads)
        return _Captured(own, entered, left, left_grad, forward, backward)

    @contextmanager
    def _stand_ins(self) -> Iterator[list[torch.Tensor]]:
        """Leaves of the graph in place of the parameters, whose own belong to another stream already."""
        stand_ins = {id(p): p.detach().requires_grad_(True) for p in self.parameters}
        before = [layer.products for layer in self.layers]
        for layer in self.layers:
            layer.products = {
                name: replace(op, masters=tuple(stand_ins[id(master)] for master in op.masters))
                for name, op in layer.products.items()
            }
        try:
            yield list(stand_ins.values())
        finally:
            for layer, products in zip(self.layers, before, strict=True):
                layer.products = products

    def _room(self, tensors: _Tensors, tokens: int, now: Pass) -> Pass:
        """A pass of that size, whose tensors the graph reads."""
        samples, longest = self._samples, self._longest
        turns = {kind: (cos[:tokens], sin[:tokens]) for kind, (cos, sin) in tensors.turns.items()}
        starts = torch.zeros(samples + 1, dtype=torch.int32, device=self.device)
        spans = Spans((longest,) * samples, (longest,) * samples, starts, starts)
        key_t = None if now.key_t is None else tensors.key_t[:tokens]
        return replace(now, spans=spans, turns=turns, keep=None, key_t=key_t)


def _starts(spans: Spans, entries: int) -> torch.Tensor:
    """Running sums of the samples' lengths, with empty samples after them."""
    sums = [0, *accumulate(spans.queries)]
    return torch.tensor(sums + sums[-1:] * (entries - len(sums)), dtype=torch.int32)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, captured: _Captured, x_th: torch.Tensor, now: Pass, anchor: torch.Tensor
    ) -> torch.Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        graphs.put(captured, x_th, now)
        captured.forward.replay()
        return captured.left.view_as(captured.left)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        graphs, captured = ctx.graphs, ctx.captured
        captured.left_grad.copy_(grads[0])
        graphs.collect()
        captured.backward.replay()
        return None, None, None, None, None
