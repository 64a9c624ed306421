"""Keys and values of the tokens that have been read: one slot a row, all layers, of a fixed capacity.

Names: ``s`` slots, ``c`` capacity in tokens, ``n`` key heads, ``d`` their width, ``t`` tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.model.decoder.shape import Shape

ROUNDED = 32  # tokens by which stores grow
SPARE = 2  # so many times what is needed is worth laying out anew


@dataclass(frozen=True)
class Prefix:
    """Tokens that begin several prompts, read once: their keys and values [t, n, d], a layer each."""

    ids: tuple[int, ...] = ()
    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()

    def first(self, count: int) -> Prefix:
        """Its first tokens."""
        keys, values = (tuple(x_tnd[:count] for x_tnd in stores) for stores in (self.keys, self.values))
        return Prefix(self.ids[:count], keys, values)


class Cache:
    """[s, n, c, d] keys and values of each layer: those of a head lie together. Lengths are the caller's business.

    On a CPU, c follows what the rows hold (`reach`, `fit`), in rounds: products of a whole store read it as it lies,
    those of its beginning would copy that first, and the library compiles a product anew for every other c.
    """

    def __init__(self, shape: Shape, slots: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """``capacity``: tokens that a slot holds at most."""
        self.slots, self.heads, self.capacity = slots, shape.kv_heads, capacity
        self._follows = device.type == "cpu"
        self.held = min(capacity, ROUNDED) if self._follows else capacity  # c
        self._head_n = torch.arange(shape.kv_heads, device=device)
        # Zeros, not whatever was there: a masked place weighs 0, and 0 times a stray NaN would be NaN.
        sizes = (2, slots, shape.kv_heads, self.held, shape.head_dim)
        self._pairs = [torch.zeros(sizes, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.keys = [pair[0] for pair in self._pairs]
        self.values = [pair[1] for pair in self._pairs]

    def reach(self, tokens: int) -> None:
        """Make room for rows of so many tokens, which are no more than the capacity."""
        if tokens > self.held:
            self._lay_out(min(self.capacity, -(-tokens // ROUNDED) * ROUNDED))

    def fit(self, tokens: int) -> None:
        """`reach`, and let go of most of what no row needs when the longest has so many tokens."""
        self.reach(tokens)
        wanted = -(-tokens // ROUNDED) * ROUNDED
        if self._follows and SPARE * wanted <= self.held:
            self._lay_out(wanted)

    def _lay_out(self, held: int) -> None:
        kept = min(held, self.held)
        for layer, old in enumerate(self._pairs):
            pair = old.new_empty(2, self.slots, self.heads, held, old.shape[-1])
            pair[..., :kept, :] = old[..., :kept, :]
            pair[..., kept:, :] = 0
            self._pairs[layer], self.keys[layer], self.values[layer] = pair, pair[0], pair[1]
        self.held = held

    def places(self, slot_t: torch.Tensor, position_t: torch.Tensor) -> torch.Tensor:
        """[t * n] where tokens of these slots and positions lie in a layer's store, head by head."""
        return ((slot_t[:, None] * self.heads + self._head_n) * self.held + position_t[:, None]).flatten()

    def put(self, layer: int, places: torch.Tensor, k_tnd: torch.Tensor, v_tnd: torch.Tensor) -> None:
        """Keep the keys and values of tokens at `places`."""
        for store, new in ((self.keys[layer], k_tnd), (self.values[layer], v_tnd)):
            store.view(-1, new.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))

    def pair_places(self, slot_t: torch.Tensor, position_t: torch.Tensor) -> torch.Tensor:
        """[t * 2n] where the keys, then the values of these tokens lie in a layer's two stores."""
        places_tn = self.places(slot_t, position_t).view(-1, self.heads)
        return torch.cat([places_tn, places_tn + self.slots * self.heads * self.held], 1).flatten()

    def put_pairs(self, layer: int, places: torch.Tensor, kv_tmd: torch.Tensor) -> None:
        """Keep the keys and values of tokens, which lie behind one another [t, 2n, d], at `pair_places`."""
        width = kv_tmd.shape[-1]
        self._pairs[layer].view(-1, width).index_copy_(0, places, kv_tmd.reshape(-1, width))

    def spread(self, slots: Sequence[int], prefix: Prefix) -> None:
        """Lay the same beginning into several slots."""
        self.reach(len(prefix.ids))
        own = torch.tensor(list(slots), device=self._head_n.device)
        for stores, parts in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for store, new in zip(stores, parts, strict=True):
                store[own, :, : len(new)] = new.transpose(0, 1)

    def at(self, layer: int, slot_t: torch.Tensor, position_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[t, n, d] keys and values of tokens of these slots and positions."""
        k, v = (store[layer].transpose(1, 2)[slot_t, position_t] for store in (self.keys, self.values))
        return k, v

    def prefix(self, slot: int, ids: Sequence[int]) -> Prefix:
        """A copy of what the slot holds of its first tokens, which are these."""
        keys, values = (
            tuple(store[slot, :, : len(ids)].transpose(0, 1).contiguous() for store in stores)
            for stores in (self.keys, self.values)
        )
        return Prefix(tuple(ids), keys, values)

    def move(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of one slot to another."""
        for store in (*self.keys, *self.values):
            store[target, :, :length].copy_(store[source, :, :length])
