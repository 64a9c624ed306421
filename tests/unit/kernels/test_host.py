"""A step's forms for a CPU against the general ones."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.attention import attend, attend_cached, spans
from luthier.kernels.host import (
    COLUMNS,
    Prompts,
    attend_prompts,
    attend_rows,
    doubled,
    likeliest,
    normed,
    seen_mask,
    turned,
)
from luthier.kernels.linear import Norm
from luthier.kernels.norm import rms_norm
from luthier.kernels.rotary import rotate

LIMIT = {torch.float32: 2e-6, torch.bfloat16: 4e-2}


SIZES = [(32, 6, 2, 40), (2, 4, 4, 17), (1, 6, 2, 9), (9, 4, 2, 600)]  # rows, heads, key heads, keys


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_of_a_step(dtype: torch.dtype, window: int | None, sizes: tuple[int, int, int, int]) -> None:
    rows, heads, kv_heads, keys = sizes
    torch.manual_seed(0)
    q = torch.randn(rows, heads, 16).to(dtype)
    k, v = (torch.randn(rows, kv_heads, keys + 7, 16).to(dtype)[:, :, :keys] for _ in range(2))
    held_r = torch.randint(1, keys + 1, (rows,))
    want = attend_cached(q.double(), k.double(), v.double(), held_r, scale=0.25, window=window)
    whole = k.contiguous(), v.contiguous()
    for store, longest in (((k, v), None), (whole, None), (whole, int(held_r.max()))):
        got = attend_rows(q, *store, seen_mask(held_r, keys, window, dtype), 0.25, longest)
        assert got.dtype == dtype and got.shape == (rows, heads, 16)
        assert (got.double() - want).abs().max() < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("lengths", [[7], [1, 1], [9, 8, 8, 3, 1], [2, 30, 29, 1, 28, 5, 5]])
def test_attention_of_prompts(dtype: torch.dtype, lengths: list[int]) -> None:
    torch.manual_seed(0)
    whole = torch.randn(sum(lengths), 6 + 2 * 2, 16).to(dtype)
    prompts = Prompts.of(lengths)
    assert sum(count for count, _, _ in prompts.groups) == len(lengths)
    q, k, v = whole.double().split([6, 2, 2], 1)
    want = attend(q, k, v, spans(lengths, "cpu"), kind="padded", scale=0.25).flatten(1)
    got = attend_prompts(whole, 6, 2, prompts, 0.25)
    assert got.dtype == dtype and (got.double() - want).abs().max() < LIMIT[dtype]
    other = whole.clone()
    other[lengths[0] :] = 50.0  # a prompt does not see its neighbours
    assert torch.equal(attend_prompts(other, 6, 2, prompts, 0.25)[: lengths[0]], got[: lengths[0]])


def test_what_a_row_does_not_hold_is_not_seen() -> None:
    q, k, v = torch.randn(8, 4, 8), torch.randn(8, 2, 12, 8), torch.randn(8, 2, 12, 8)
    mask = seen_mask(torch.full((8,), 5), 12, None)
    want = attend_rows(q, k, v, mask, 1.0)
    k[:, :, 5:], v[:, :, 5:] = 99.0, 99.0
    assert torch.equal(attend_rows(q, k, v, mask, 1.0), want)


@pytest.mark.parametrize("size", [7, COLUMNS, 3 * COLUMNS, 3 * COLUMNS + 5])
def test_the_likeliest_is_what_argmax_finds(size: int) -> None:
    """Among few values, so that equals are many; and in rows of -inf, of one value, and with something not a number."""
    torch.manual_seed(size)
    scores = torch.randint(0, 9, (40, size)).float()
    scores[0], scores[1], scores[2, size // 2], scores[3, -1] = float("-inf"), 1.0, float("nan"), 99.0
    scores[4], scores[4, -1] = float("-inf"), -5.0
    assert torch.equal(likeliest(scores), scores.argmax(-1))


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(9, 40) * 30).to(dtype), torch.randn(40)
    x[1] = 0.0  # eps alone keeps it from 0 / 0
    got = normed(x, Norm(weight, 1e-5, offset))
    want, _ = rms_norm(x, weight, 1e-5, offset)
    assert got.dtype == dtype and torch.allclose(got, want, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", LIMIT)
def test_rotation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv, angles = torch.randn(5, 8 * 16).to(dtype), torch.randn(5, 8) * 9
    cos, sin = angles.cos(), angles.sin()
    got = turned(qkv.clone(), *doubled(cos, sin), 4, 2).split([4, 2, 2], 1)
    for one, other in zip(got, rotate(qkv, cos, sin, 4, 2, 16), strict=True):
        assert one.dtype == dtype and torch.allclose(one, other, atol=1e-6 if dtype == torch.float32 else 2e-2)
