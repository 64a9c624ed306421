"""Keys and values of the tokens that have been read: one slot a row, all layers, of a fixed capacity.

Names: ``s`` slots, ``c`` capacity in tokens, ``n`` key heads, ``d`` their width, ``t`` tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.model.decoder.shape import Shape


def token_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that one token takes in all layers."""
    return 2 * shape.layers * shape.kv_rows * dtype.itemsize


class Cache:
    """[s, c, n, d] keys and values of each layer, and the [s] lengths are the caller's business."""

    def __init__(self, shape: Shape, slots: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots, self.capacity = slots, capacity
        # Zeros, not whatever was there: a masked place weighs 0, and 0 times a stray NaN would be NaN.
        sizes = (slots, capacity, shape.kv_heads, shape.head_dim)
        self.keys = [torch.zeros(sizes, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.values = [torch.zeros(sizes, device=device, dtype=dtype) for _ in range(shape.layers)]

    def put(self, layer: int, place_t: torch.Tensor, k_tnd: torch.Tensor, v_tnd: torch.Tensor) -> None:
        """Keep the keys and values of tokens; ``place_t`` [t] is slot * capacity + position."""
        for store, new in ((self.keys[layer], k_tnd), (self.values[layer], v_tnd)):
            store.view(-1, *new.shape[1:]).index_copy_(0, place_t, new)

    def spread(self, layer: int, slots: Sequence[int], k_tnd: torch.Tensor, v_tnd: torch.Tensor) -> None:
        """Lay the same keys and values at the beginning of several slots."""
        for slot in slots:
            self.keys[layer][slot, : len(k_tnd)].copy_(k_tnd)
            self.values[layer][slot, : len(v_tnd)].copy_(v_tnd)

    def move(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of one slot to another."""
        for store in (*self.keys, *self.values):
            store[target, :length].copy_(store[source, :length])
