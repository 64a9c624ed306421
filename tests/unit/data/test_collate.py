from __future__ import annotations

import torch

from luthier.data.collate import collate
from luthier.types import Example


def test_segments_end_to_end() -> None:
    batch = collate([Example((5, 6, 7), (1.0, 0.0, 1.0), 0), Example((8, 9), (0.0, 0.5), 1)])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.segment.tolist() == [0, 0, 0, 1, 1]
    assert batch.target_weight.tolist() == [0.0, 0.0, 1.0, 0.0, 0.5]
    assert batch.lengths == (3, 2)
    assert batch.ids.dtype == batch.positions.dtype == batch.segment.dtype == torch.int64
    assert batch.target_weight.dtype == torch.float32


def test_an_empty_pass() -> None:
    batch = collate([])
    assert batch.lengths == () and batch.ids.numel() == 0 and batch.target_weight.sum() == 0
