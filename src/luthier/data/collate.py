"""Examples to the tensors of one pass. The one module of `data` that imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from luthier.data.share import Piece, cut
from luthier.types import Batch, Example


def collate(examples: Sequence[Example], step: int | None = None, *, share: bool = False) -> Batch:
    """Lay examples end to end on the CPU; shapes as `Batch` documents. No examples make an empty batch, weighing 0.

    With ``step`` every token has a ``key``, made of the step, the sample and the position alone: what random draws of
    training depend on, so that neither a resume nor the cut of a batch into passes changes them.
    With ``share``, what examples start with in common is a segment of its own, which theirs go on from.
    """
    pieces = cut(examples) if share else [Piece(i, 0, e.length) for i, e in enumerate(examples)]
    own = [(examples[one.example], one) for one in pieces]
    lengths = tuple(one.stop - one.start for one in pieces)
    sizes, parents = torch.tensor(lengths, dtype=torch.int64), torch.tensor([one.parent for one in pieces]).long()
    starts = torch.cumsum(sizes, 0) - sizes
    segment = torch.from_numpy(np.repeat(np.arange(len(pieces)), lengths))  # torch's starts threads for it
    weight = torch.tensor([w for e, one in own for w in e.weights[one.start : one.stop]], dtype=torch.float32)
    heads = parents < 0
    weight[starts[heads & (sizes > 0)]] = 0.0  # nothing precedes them
    place = torch.arange(int(sizes.sum()))
    before = place - 1
    before[starts[~heads]] = (starts + sizes - 1)[parents[~heads]]
    supervised = weight.nonzero().squeeze(-1)
    positions = place - starts[segment] + torch.tensor([one.start for one in pieces], dtype=torch.int64)[segment]
    draws = torch.tensor([0 if step is None else _draw(step, e) for e, _ in own], dtype=torch.int64)
    return Batch(
        ids=torch.tensor([i for e, one in own for i in e.ids[one.start : one.stop]], dtype=torch.int64),
        positions=positions,
        segment=segment,
        target_weight=weight,
        lengths=lengths,
        supervised=supervised,
        source=before[supervised],
        key=None if step is None else draws[segment] + positions,
        step=step,
        parent_segment=None if bool(heads.all()) else parents,
    )


def _draw(step: int, example: Example) -> int:
    digest = hashlib.blake2b(f"{step}:{example.row}:{example.turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2  # room for the positions
