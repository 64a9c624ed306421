"""Streamed matrices: one piece of memory each, and the order that they are asked for in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from luthier.kernels.nf4 import Packed
from luthier.model.decoder import weights
from luthier.model.decoder.weights import Order, Scratch, Stage, Streamed

LAYERS, EACH = 3, 4


def asked(recomputed: bool) -> Iterator[int]:
    """Matrices of a pass: forwards, then backwards, where layers may go forwards once more."""
    yield from range(LAYERS * EACH)
    for layer in reversed(range(LAYERS)):
        own = range(layer * EACH, (layer + 1) * EACH)
        yield from own if recomputed else ()
        yield from reversed(own)


def missed(order: Order, passes: list[int]) -> int:
    """How often another matrix came than was expected."""
    count, expected = 0, None
    for index in passes:
        count += expected is not None and expected != index
        expected = order.after(index)
    return count


def test_what_comes_next_is_known_from_the_first_pass_on() -> None:
    for recomputed in (True, False):
        order, once = Order(), list(asked(recomputed))
        assert missed(order, once) >= (2 * LAYERS if recomputed else 1)
        assert missed(order, once) <= 1  # where one pass follows another for the first time
        assert missed(order, 3 * once) == 0
    evaluated = list(range(LAYERS * EACH))  # forwards alone, in between
    assert missed(order, evaluated) <= 1 and missed(order, 2 * evaluated) <= 1


def test_all_tensors_of_a_matrix_lie_in_one_piece_and_come_back_as_they_were() -> None:
    draw = torch.Generator().manual_seed(1)
    parts: list[Packed | torch.Tensor] = []
    for rows in (3, 5):
        codes = torch.randint(0, 256, (rows * 32,), dtype=torch.uint8, generator=draw)
        scales = torch.randint(0, 256, (rows,), dtype=torch.uint8, generator=draw)
        table, nested, outer = (torch.rand(size, generator=draw) for size in (16, 256, 1))
        parts.append(Packed(codes, table, scales, (rows, 64), 64, nested, outer, offset=0.5))
    parts.append(torch.rand(2, 64, generator=draw).to(torch.bfloat16).t().contiguous().t())
    matrix = Streamed(parts, Stage(Scratch("cpu", torch.float32)))
    assert matrix.host.dtype == torch.uint8 and matrix.host.dim() == 1
    for before, after in zip(parts, matrix.parts, strict=True):
        for one, other in zip(weights._tensors(before), weights._tensors(after), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
            assert other.untyped_storage().data_ptr() == matrix.host.untyped_storage().data_ptr()
    got = matrix.get()
    assert got.shape == (10, 64) and torch.equal(got[8:], parts[-1].float())
