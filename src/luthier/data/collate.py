"""Examples to the tensors of one pass. The one module of `data` that imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from luthier.types import Batch, Example


def collate(examples: Sequence[Example], step: int | None = None) -> Batch:
    """Lay examples end to end on the CPU; shapes as `Batch` documents. No examples make an empty batch, weighing 0.

    With ``step`` every token has a ``key``, made of the step, the sample and the position alone: what random draws of
    training depend on, so that neither a resume nor the cut of a batch into passes changes them.
    """
    lengths = tuple(e.length for e in examples)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.cumsum(sizes, 0) - sizes
    segment = torch.repeat_interleave(torch.arange(len(examples)), sizes)
    weight = torch.tensor([w for e in examples for w in e.weights], dtype=torch.float32)
    weight[starts[sizes > 0]] = 0.0  # nothing precedes a segment's first token
    supervised = weight.nonzero().squeeze(-1)
    positions = torch.arange(int(sizes.sum())) - starts[segment]
    draws = torch.tensor([0 if step is None else _draw(step, one) for one in examples], dtype=torch.int64)
    return Batch(
        ids=torch.tensor([i for e in examples for i in e.ids], dtype=torch.int64),
        positions=positions,
        segment=segment,
        target_weight=weight,
        lengths=lengths,
        supervised=supervised,
        source=supervised - 1,
        key=None if step is None else draws[segment] + positions,
    )


def _draw(step: int, example: Example) -> int:
    digest = hashlib.blake2b(f"{step}:{example.row}:{example.turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2  # room for the positions


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on ``device``."""

    def move(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    tensors = ("ids", "positions", "segment", "target_weight", "supervised", "source", "key")
    names = (*tensors, "parent_segment", "adapter_index")
    moved: dict[str, Any] = {name: move(getattr(batch, name)) for name in names}
    fields: dict[str, Any] = {
        name: {key: move(value) for key, value in getattr(batch, name).items()}
        for name in ("token_fields", "segment_fields")
    }
    return replace(batch, **moved, **fields)
