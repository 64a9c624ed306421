"""Rows of different adapters in one pass: their updates as one product, of which each row keeps its own ranks.

    inner [t, r] = x A^T, A of all adapters below one another → times the row's weights: its adapter's scale, else 0
    out [t, o] += inner B^T, B of all adapters side by side

Two products whatever the adapters, nothing gathered, the same work at each step, so a step can be a CUDA graph. What a
row does not use adds zeros to it. It costs the ranks of all adapters at hand, which a call's requests name.

Names: ``t`` tokens of a pass, ``r`` ranks of all adapters, ``k`` adapters and, first, none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from luthier.kernels.linear import Update
from luthier.model.decoder.adapter import Adapter


@dataclass(frozen=True)
class Mixed:
    """The updates of one matrix: A [r, in], B [out, r], and the weights [k, r] of each adapter's rows."""

    a_rh: torch.Tensor
    b_or: torch.Tensor
    weight_kr: torch.Tensor


@dataclass(frozen=True)
class Chosen:
    """Which adapter each token of a pass has, as weights of the ranks of each matrix."""

    layers: Sequence[Mapping[str, Mixed]]
    weights: Mapping[int, torch.Tensor]  # id of a table of weights → its rows [t, r]

    def has(self, layer: int, product: str) -> bool:
        """Whether any adapter updates this matrix."""
        return product in self.layers[layer]

    def add(self, layer: int, product: str, out_to: torch.Tensor, x_th: torch.Tensor) -> torch.Tensor:
        """``out_to`` with each token's own update of what enters the matrix added in place."""
        own = self.layers[layer][product]
        inner_tr = (x_th @ own.a_rh.t()).mul_(self.weights[id(own.weight_kr)])
        return out_to.addmm_(inner_tr, own.b_or.t())

    def first(self, rows: torch.Tensor) -> Chosen:
        """The same of some tokens alone."""
        return Chosen(self.layers, {key: weight[rows] for key, weight in self.weights.items()})


class Mixing:
    """Several adapters laid out for one decoder. Number 0 is none of them, number i the i-th."""

    def __init__(self, adapters: Sequence[Adapter], rows: Mapping[str, int]) -> None:
        """``rows``: product → rows of its matrix. There is at least one adapter."""
        self.numbers: dict[str | None, int] = {None: 0, **{one.name: at for at, one in enumerate(adapters, 1)}}
        self._tables: dict[tuple[tuple[tuple[float, int], ...], ...], torch.Tensor] = {}
        self.layers = [
            {
                product: self._mixed([own.get(product) for own in layer], size)
                for product, size in rows.items()
                if any(product in own for own in layer)
            }
            for layer in zip(*(one.layers for one in adapters), strict=True)
        ]

    def choose(self, number_t: torch.Tensor) -> Chosen:
        """For tokens whose adapters have these numbers [t], on the device."""
        return Chosen(self.layers, {id(table): table.index_select(0, number_t) for table in self._tables.values()})

    def _mixed(self, updates: Sequence[Update | None], rows: int) -> Mixed:
        present = [one for one in updates if one is not None]
        a_rh = torch.cat([one.a_rh for one in present])
        b_or = a_rh.new_zeros(rows, len(a_rh))
        start = 0
        for one in present:
            for part, b in zip(one.parts, one.b, strict=True):
                b_or[part.rows, start + part.ranks.start : start + part.ranks.stop] = b
            start += len(one.a_rh)
        scales = tuple(
            () if one is None else tuple((part.scale, part.ranks.stop - part.ranks.start) for part in one.parts)
            for one in updates
        )
        if scales not in self._tables:
            self._tables[scales] = _weights(scales, a_rh)
        return Mixed(a_rh, b_or, self._tables[scales])


def _weights(scales: Sequence[Sequence[tuple[float, int]]], like: torch.Tensor) -> torch.Tensor:
    """[k, r] the scale of each rank in the row of its adapter, 0 elsewhere."""
    table = like.new_zeros(len(scales) + 1, len(like))
    start = 0
    for row, own in enumerate(scales, 1):
        for scale, ranks in own:
            table[row, start : start + ranks] = scale
            start += ranks
    return table
