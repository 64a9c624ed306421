"""Dropout of transformers and PEFT models whose masks belong to a sample and a position, as those of the decoder do.

What an adapter drops of its weights instead (LoHa's and LoKr's ``rank_dropout`` and ``module_dropout``, BOFT's) belongs
to the step. What a base's own code draws over a whole pass (inside attention) belongs to neither, and is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from luthier.kernels import keyed

OF_ADAPTERS = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora|vera)_dropout\.[^.]+")  # PEFT's names
OF_A_BASE = re.compile(r"^(?!classifier|summary).*(?:p_?drop|dropout|drop_rate|layerdrop)")  # keys of configs


def token_keys(key_t: torch.Tensor, seed: int) -> torch.Tensor:
    """32-bit keys, with the seed in them, of the 64-bit ones that a `Batch` has."""
    high, low = key_t >> 32, key_t & keyed.MASK
    return keyed.mix(low ^ keyed.mix(high ^ keyed.hash_of(seed)))


class Drawing:
    """What the draws of the pass that a model computes now depend on; nothing is known outside of training."""

    def __init__(self) -> None:
        self.keys: tuple[torch.Tensor, ...] = ()  # [b, l] of the tokens, [b, k] of those that the head is computed for
        self.step: int | None = None

    def expect(self, key_bl: torch.Tensor | None, kept_k: torch.Tensor | None, step: int | None) -> None:
        """The next forward pass has these tokens, of which the head sees the columns ``kept_k``."""
        heads = [] if key_bl is None or kept_k is None else [key_bl[:, kept_k]]
        self.keys = () if key_bl is None else (key_bl, *heads)
        self.step = step

    def recalled(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: what a block computes again has the tokens that it had."""
        return nullcontext(), self._held(self.keys, self.step)

    @contextmanager
    def _held(self, keys: tuple[torch.Tensor, ...], step: int | None) -> Iterator[None]:
        now = self.keys, self.step
        self.keys, self.step = keys, step
        try:
            yield
        finally:
            self.keys, self.step = now

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """[t] keys of the rows of ``x``, which is [b, l, h], [b, k, h] or either in one; None for another shape."""
        for key in self.keys:
            if (x.dim() == 3 and x.shape[:2] == key.shape) or (x.dim() == 2 and len(x) == key.numel()):
                return key.reshape(-1)
        return None


class KeyedDropout(nn.Dropout):
    """Takes the place of a dropout that sees tokens. ``salt`` names the layer and the matrix.

    ``by_pass``: whether it may draw over a pass: the base's own may serve attention, which reads ``p`` alone; an
    adapter's does once it saw a shape in which tokens cannot be told apart (routed to experts).
    """

    def __init__(self, p: float, salt: int, drawing: Drawing, *, by_pass: bool) -> None:
        super().__init__(p)
        self.salt, self.drawing, self.by_pass = salt, drawing, by_pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` with the mask of its tokens; torch's own draw where there are no keys."""
        if not self.training or self.p == 0:
            return input
        key_t = self.drawing.of(input)
        if key_t is None:
            self.by_pass = self.by_pass or bool(self.drawing.keys)
            return super().forward(input)
        out: torch.Tensor = _Keyed.apply(input, key_t, self.salt, self.p)  # type: ignore[no-untyped-call]
        return out


class _Keyed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, key_t: torch.Tensor, salt: int, p: float) -> torch.Tensor:
        ctx.save_for_backward(key_t)
        ctx.salt, ctx.p = salt, p
        return _masked(x, key_t, salt, p)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (key_t,) = ctx.saved_tensors
        return _masked(grads[0], key_t, ctx.salt, ctx.p), None, None, None


def _masked(x: torch.Tensor, key_t: torch.Tensor, salt: int, p: float) -> torch.Tensor:
    return keyed.dropout(x.reshape(len(key_t), -1), key_t, salt, p).reshape(x.shape)


def key_dropouts(model: nn.Module, seed: int) -> Drawing | None:
    """Let every dropout of ``model`` draw from the returned `Drawing`; None where nothing is dropped.

    An adapter's is named as the decoder names it, so both draw the same.
    """
    drawing, found = Drawing(), False
    for name, module in list(model.named_modules()):
        of_adapter = OF_ADAPTERS.fullmatch(name)
        salt = keyed.hash_of(*(of_adapter["module"] if of_adapter else name).encode())
        if isinstance(module, nn.Dropout) and module.p > 0:
            parent, _, last = name.rpartition(".")
            made = KeyedDropout(module.p, salt, drawing, by_pass=of_adapter is None)
            setattr(model.get_submodule(parent), last, made.train(module.training))
        elif _drops_weights(module):
            _draw_by_step(module, keyed.hash_of(seed, salt), drawing)
        else:
            continue
        found = True
    return drawing if found else None


def _drops_weights(module: nn.Module) -> bool:
    """PEFT's LoHa and LoKr hold a share for each adapter; BOFT has a layer for it."""
    for name in ("rank_dropout", "module_dropout"):
        shares = getattr(module, name, None)
        if isinstance(shares, dict) and any(float(one) > 0 for one in shares.values()):
            return True
    return type(module).__name__ == "MultiplicativeDropoutLayer" and float(getattr(module, "p", 0.0)) > 0


def _draw_by_step(module: nn.Module, salt: int, drawing: Drawing) -> None:
    """Its draws come from the step and ``salt``, however often it is called; those of others go on as they were."""
    plain = getattr(module.forward, "plain", module.forward)

    def forward(*inputs: Any, **named: Any) -> Any:
        if not module.training or drawing.step is None:
            return plain(*inputs, **named)
        device = inputs[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(keyed.hash_of(salt, drawing.step))
            return plain(*inputs, **named)

    forward.plain = plain  # type: ignore[attr-defined]  # for another model around the same module
    module.forward = forward  # type: ignore[method-assign]


def drawn_by_pass(model: nn.Module) -> list[str]:
    """What may draw over a whole pass, by its key in the base's config or by its module.

    Such dropout depends on how a step is cut into passes, and so on the number of ranks too.
    """
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    keys = [key for key, value in values.items() if OF_A_BASE.search(key) and isinstance(value, float) and value > 0]
    return keys or [name for name, module in model.named_modules() if _by_pass(module)]


def _by_pass(module: nn.Module) -> bool:
    if isinstance(module, KeyedDropout):
        return module.by_pass
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    share = getattr(module, "attention_dropout", 0.0)  # transformers' attention hands it to its kernel
    return isinstance(share, float) and share > 0
