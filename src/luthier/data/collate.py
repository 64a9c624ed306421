"""Examples to the tensors of one pass. The one module of `data` that imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.types import Batch, Example


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end on the CPU; shapes as `Batch` documents. No examples make an empty batch, weighing 0."""
    lengths = tuple(e.length for e in examples)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.cumsum(sizes, 0) - sizes
    segment = torch.repeat_interleave(torch.arange(len(examples)), sizes)
    weight = torch.tensor([w for e in examples for w in e.weights], dtype=torch.float32)
    weight[starts[sizes > 0]] = 0.0  # nothing precedes a segment's first token
    supervised = weight.nonzero().squeeze(-1)
    return Batch(
        ids=torch.tensor([i for e in examples for i in e.ids], dtype=torch.int64),
        positions=torch.arange(int(sizes.sum())) - starts[segment],
        segment=segment,
        target_weight=weight,
        lengths=lengths,
        supervised=supervised,
        source=supervised - 1,
    )
