"""The compiled programs of a step on a CPU against the general forms in fp64."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels.attention import attend_cached
from luthier.kernels.cpu import step
from luthier.kernels.host import attend_rows, seen_mask
from luthier.kernels.linear import Norm
from luthier.kernels.norm import rms_norm
from luthier.kernels.rotary import rotate

pytest.importorskip("numba")

LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
SIZES = [(32, 6, 2, 40), (2, 4, 4, 17), (1, 6, 2, 1), (9, 4, 1, 600)]  # rows, heads, key heads, the most keys
WIDTH = 24


def case(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows, heads, kv_heads, keys = sizes
    torch.manual_seed(rows)
    angles = torch.rand(rows, WIDTH // 2) * 6
    return {
        "qkv": torch.randn(rows, (heads + 2 * kv_heads) * WIDTH).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k": torch.randn(rows, kv_heads, keys + 3, WIDTH).to(dtype),
        "v": torch.randn(rows, kv_heads, keys + 3, WIDTH).to(dtype),
        "held": torch.randint(0, keys, (rows,)),
    }


def run(of: dict[str, torch.Tensor], window: int | None = None) -> torch.Tensor:
    return step.attend(of["qkv"], (of["cos"], of["sin"]), of["k"], of["v"], of["held"], 0.2, window)


def reference(of: dict[str, torch.Tensor], sizes: tuple[int, int, int, int], window: int | None) -> torch.Tensor:
    """[r, heads * d] fp64: rotated and rounded as training does it, put into copies of the stores, attended to."""
    rows, heads, kv_heads, _ = sizes
    q, k, v = rotate(of["qkv"], of["cos"], of["sin"], heads, kv_heads, WIDTH)
    keys, values = of["k"].clone(), of["v"].clone()
    every = torch.arange(rows)
    keys[every, :, of["held"]], values[every, :, of["held"]] = k, v
    out = attend_cached(q.double(), keys.double(), values.double(), of["held"] + 1, scale=0.2, window=window)
    return out.flatten(1)


@pytest.mark.parametrize("dtype", LIMIT)
def test_this_machine_compiles(dtype: torch.dtype) -> None:
    """Else every other test here would speak of programs that nothing uses."""
    assert step.serves(dtype)
    assert not step.serves(torch.float64)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_of_a_step(dtype: torch.dtype, window: int | None, sizes: tuple[int, int, int, int]) -> None:
    of = case(sizes, dtype)
    want = reference(of, sizes, window)
    got = run(of, window)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).abs().max() < LIMIT[dtype] * want.abs().max()


def test_in_bf16_it_is_nearer_than_torchs_operations() -> None:
    sizes = (16, 6, 2, 300)
    of = case(sizes, torch.bfloat16)
    want = reference(of, sizes, None)
    q = rotate(of["qkv"], of["cos"], of["sin"], 6, 2, WIDTH)[0]
    got = run(of)
    plain = attend_rows(q, of["k"], of["v"], seen_mask(of["held"] + 1, 303, None, torch.bfloat16), 0.2).flatten(1)
    assert (got.double() - want).norm() < (plain.double() - want).norm()


@pytest.mark.parametrize("halfway", [False, True])
def test_the_token_is_kept_and_nothing_else_is_touched(halfway: bool) -> None:
    sizes = (5, 6, 2, 40)
    of = case(sizes, torch.bfloat16)
    if halfway:  # half of all numbers times 1.5 lie between two of bf16
        of["cos"][:], of["sin"][:] = 1.5, 0.0
    before = of["k"].clone(), of["v"].clone()
    run(of)
    _, k, v = rotate(of["qkv"], of["cos"], of["sin"], 6, 2, WIDTH)
    every = torch.arange(5)
    assert torch.equal(of["k"][every, :, of["held"]], k) and torch.equal(of["v"][every, :, of["held"]], v)
    for store, old in zip((of["k"], of["v"]), before, strict=True):
        store[every, :, of["held"]] = old[every, :, of["held"]]
        assert torch.equal(store, old)


@pytest.mark.parametrize("dtype", LIMIT)
def test_what_a_row_does_not_hold_is_not_seen_and_neighbours_change_nothing(dtype: torch.dtype) -> None:
    sizes = (7, 6, 2, 90)
    of = case(sizes, dtype)
    want = run({name: value.clone() for name, value in of.items()})
    for row, held in enumerate(of["held"].tolist()):
        of["k"][row, :, held + 1 :] = of["v"][row, :, held + 1 :] = float("nan")
    assert torch.equal(run({name: value.clone() for name, value in of.items()}), want)
    alone = {name: value[3:4].contiguous() for name, value in of.items()}
    assert torch.equal(run(alone)[0], want[3])
    one = step.attend(of["qkv"], (of["cos"], of["sin"]), of["k"], of["v"], of["held"], 0.2, None, shared=False)
    assert torch.equal(one, want)  # by one thread or by all


def test_far_scores_neither_overflow_nor_vanish() -> None:
    of = case((3, 4, 2, 50), torch.float32)
    of["qkv"] *= 300
    want = reference(of, (3, 4, 2, 50), None)
    got = run(of)
    assert got.isfinite().all() and (got.double() - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("rows", [1, 6, 700])
def test_norm(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 72).to(dtype)
    norm = Norm(torch.randn(72).to(dtype), 1e-5)
    want = rms_norm(x.double(), norm.weight.double(), norm.eps, 0.0)[0]
    got = step.normed(x, norm)
    assert got.dtype == dtype and (got.double() - want).abs().max() < LIMIT[dtype] * want.abs().max()
    assert torch.equal(step.normed(x[:1], norm), got[:1])  # by one thread or by all


def test_a_norm_with_an_offset_takes_the_plain_form() -> None:
    x, norm = torch.randn(3, 16), Norm(torch.randn(16), 1e-5, offset=1.0)
    assert torch.allclose(step.normed(x, norm), rms_norm(x, norm.weight, norm.eps, 1.0)[0], atol=1e-6)


def test_without_numba_the_plain_form_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(step, "_served", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not step.installed()
    assert not step.tried(torch.float32) and not step.serves(torch.float32) and step.tried(torch.float32)
