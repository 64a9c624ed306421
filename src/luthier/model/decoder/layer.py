"""One decoder layer: attention and feed-forward, each behind a norm and beside the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from luthier.kernels import host_training
from luthier.kernels.attention import Kind, Spans, attend
from luthier.kernels.linear import Linear, Norm
from luthier.kernels.rotary import Heads
from luthier.model.decoder.lora import Group, Pair
from luthier.model.decoder.nodes import in_tiles, normed, product, rotated, taken
from luthier.model.decoder.shape import Rotary, Shape


@dataclass(frozen=True)
class Pass:
    """What all layers of one pass share.

    turns: rotary kind -> cosine and sine [t, half]. keep: [n] the tokens whose outcome is wanted after the last layer.
    key_t: [t] the tokens' keys for dropout; None without it. attention: how it is computed. tile: tokens that a
    feed-forward layer works on at a time; 0: all of them.
    """

    spans: Spans
    turns: Mapping[Rotary, tuple[torch.Tensor, torch.Tensor]]
    attention: Kind
    keep: torch.Tensor | None = None
    key_t: torch.Tensor | None = None
    tile: int = 0


class Layer(nn.Module):
    """The weights of a layer as four products. Its parameters are what is trained in it, nothing else."""

    def __init__(self, number: int, shape: Shape, products: Mapping[str, Linear], norms: Mapping[str, Norm]) -> None:
        """``products``: qkv, o, gate_up, down. ``norms``: those that stand alone, by what they follow or belong to."""
        super().__init__()
        self.shape, self.number = shape, number
        self.products, self.norms = dict(products), dict(norms)
        self.pairs = cast(MutableMapping[str, Pair], nn.ModuleDict())  # torch knows its items as modules alone
        self.groups: list[Group] = []

    def adapt(self, product: str, pairs: list[tuple[Pair, slice]], dtype: torch.dtype) -> None:
        """Add low-rank updates to some rows of a product."""
        group = Group(pairs, dtype)
        self.groups.append(group)
        for pair, _ in pairs:
            self.pairs[pair.name.rsplit(".", 1)[1]] = pair
        self.products[product] = replace(self.products[product], update=group.update, masters=group.masters)

    def forward(self, x_th: torch.Tensor, now: Pass) -> torch.Tensor:
        """[t, h] to [t, h]; to [n, h] in the last layer, which goes on with the kept tokens alone after attention."""
        heads_to, x_th = self.attention(x_th, now)
        key_t = now.key_t
        if now.keep is not None and self.number == self.shape.layers - 1:
            heads_to, x_th = taken(heads_to, now.keep), taken(x_th, now.keep)
            key_t = None if key_t is None else key_t[now.keep]
        x_th = self.joined("o", heads_to, x_th, key_t)
        return in_tiles(self.feed_forward, x_th, key_t, now.tile, next(self.parameters(), x_th))

    def attention(self, x_th: torch.Tensor, now: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """[t, heads d] of what the heads have gathered, and x for the residual path."""
        shape, turn = self.shape, now.turns[self.shape.rotary[self.number]]
        frozen = host_training.serves(self.products["qkv"], x_th)
        if frozen and host_training.attends(
            x_th, now.spans, turn[0].shape[-1], shape.head_dim, shape.attention_softcap
        ):
            qkv, x_th = product(self.products["qkv"], x_th, now.key_t)
            out = host_training.attention(
                self.norm_heads(qkv) if shape.head_norms else qkv, turn, now.spans, shape.heads, shape.kv_heads,
                scale=shape.attention_scale, window=shape.window[self.number],
            )  # fmt: skip
            return out, x_th
        q, k, v, x_th = self.heads(x_th, turn, now.key_t)
        out = attend(
            q, k, v, now.spans,
            kind=now.attention,
            scale=shape.attention_scale,
            window=shape.window[self.number],
            softcap=shape.attention_softcap,
        )  # fmt: skip
        return out.flatten(1), x_th

    def heads(
        self, x_th: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], key_t: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, values ([t, their heads, d] each), and x for the residual path."""
        qkv, x_th = product(self.products["qkv"], x_th, key_t)
        return *self.split(qkv, turn), x_th

    def split(self, qkv: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> Heads:
        """Rotated queries and keys, and values, from their fused product."""
        shape = self.shape
        if shape.head_norms:
            qkv = self.norm_heads(qkv)
        return rotated(qkv, *turn, shape.heads, shape.kv_heads, shape.head_dim)

    def feed_forward(self, x_th: torch.Tensor, key_t: torch.Tensor | None) -> torch.Tensor:
        """The gated feed-forward layer, added to x."""
        gate_up, x_th = product(self.products["gate_up"], x_th, key_t)
        return self.joined("down", gate_up, x_th, key_t)

    def joined(self, name: str, value: torch.Tensor, x_th: torch.Tensor, key_t: torch.Tensor | None) -> torch.Tensor:
        """X + the product of ``value``, with a norm between where the architecture has one."""
        op = self.products[name]
        if name in self.norms:
            return x_th + normed(product(op, value, key_t)[0], self.norms[name])
        return product(op, value, key_t, x_th)[0]

    def norm_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """The fused product with each head of queries and keys normalised."""
        shape = self.shape
        q, k, v = qkv.split([shape.q_rows, shape.kv_rows, shape.kv_rows], -1)
        parts = [
            normed(part.reshape(-1, shape.head_dim), self.norms[name]).view(len(qkv), -1)
            for part, name in ((q, "q"), (k, "k"))
        ]
        return torch.cat([*parts, v], -1)
