"""Dropout of transformers and PEFT models whose masks belong to a sample and a position, as those of the decoder do.

What draws by weights instead (LoHa's and LoKr's ``rank_dropout``, ``module_dropout``, BOFT's) is the same in all passes
of a step, because every pass starts from the step's own seed; what draws over a whole pass (attention's) is not.
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


def token_keys(key_t: torch.Tensor, seed: int) -> torch.Tensor:
    """32-bit keys, with the seed in them, of the 64-bit ones that a `Batch` has."""
    high, low = key_t >> 32, key_t & keyed.MASK
    return keyed.mix(low ^ keyed.mix(high ^ keyed.hash_of(seed)))


class Tokens:
    """Which token stands where in the pass that a model computes now: [b, l] keys, or None where nothing is known."""

    def __init__(self) -> None:
        self.key_bl: torch.Tensor | None = None

    def recalled(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: what a block computes again has the tokens that it had."""
        return nullcontext(), self._held(self.key_bl)

    @contextmanager
    def _held(self, key_bl: torch.Tensor | None) -> Iterator[None]:
        now, self.key_bl = self.key_bl, key_bl
        try:
            yield
        finally:
            self.key_bl = now

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """[t] keys of the rows of ``x``, which is [b, l, h] or [b l, h]; None for another shape."""
        if self.key_bl is None:
            return None
        if x.dim() == 3 and x.shape[:2] == self.key_bl.shape:
            return self.key_bl.reshape(-1)
        if x.dim() == 2 and len(x) == self.key_bl.numel():
            return self.key_bl.reshape(-1)
        return None


class KeyedDropout(nn.Dropout):
    """Takes the place of a dropout that sees tokens. ``salt`` names the layer and the matrix.

    ``by_pass``: whether it may draw over a pass: the base's own may serve attention, which reads ``p`` alone; an
    adapter's does once it saw a shape in which tokens cannot be told apart (routed to experts).
    """

    def __init__(self, p: float, salt: int, tokens: Tokens, *, by_pass: bool) -> None:
        super().__init__(p)
        self.salt, self.tokens, self.by_pass = salt, tokens, by_pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` with the mask of its tokens; torch's own draw where there are no keys."""
        if not self.training or self.p == 0:
            return input
        key_t = self.tokens.of(input)
        if key_t is None:
            self.by_pass = self.by_pass or self.tokens.key_bl is not None
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


def key_dropouts(model: nn.Module) -> Tokens | None:
    """Let every dropout of ``model`` take keys from the returned `Tokens`; None where nothing is dropped.

    An adapter's is named as the decoder names it, so both draw the same.
    """
    tokens, found = Tokens(), False
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Dropout) or module.p == 0:
            continue
        of_adapter = OF_ADAPTERS.fullmatch(name)
        salt = keyed.hash_of(*(of_adapter["module"] if of_adapter else name).encode())
        parent, _, last = name.rpartition(".")
        made = KeyedDropout(module.p, salt, tokens, by_pass=of_adapter is None)
        setattr(model.get_submodule(parent), last, made.train(module.training))
        found = True
    return tokens if found else None


def drawn_by_pass(model: nn.Module) -> list[str]:
    """The modules whose dropout depends on how a step is cut into passes, and so on the number of ranks too."""
    return [name for name, module in model.named_modules() if _by_pass(module)]


def _by_pass(module: nn.Module) -> bool:
    if isinstance(module, KeyedDropout):
        return module.by_pass
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    share = getattr(module, "attention_dropout", 0.0)  # transformers' attention hands it to its kernel
    return isinstance(share, float) and share > 0
