"""The cache of keys and values: what is put in is found again, however its stores are laid out in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import make

from luthier.infer.cache import Cache
from luthier.model.decoder.shape import Shape, read_shape


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    folder: Path = tmp_path_factory.mktemp("qwen2")
    make(folder, "qwen2").save_pretrained(folder)
    return read_shape(folder)


def put(cache: Cache, shape: Shape, slot: int, start: int, tokens: int) -> torch.Tensor:
    """[tokens, n, d] keys put into the first layer; its values are their negatives."""
    k_tnd = torch.randn(tokens, shape.kv_heads, shape.head_dim)
    where = torch.full((tokens,), slot), torch.arange(start, start + tokens)
    cache.put(0, cache.places(*where), k_tnd, -k_tnd)
    return k_tnd


def test_stores_follow_what_rows_hold(shape: Shape) -> None:
    cache = Cache(shape, 3, 400, torch.device("cpu"), torch.float32)
    cache.reach(50)
    assert cache.held == 64
    first, second = put(cache, shape, 0, 0, 50), put(cache, shape, 2, 0, 9)
    cache.reach(120)
    assert cache.held == 128 and cache.keys[-1].shape[2] == 128
    more = put(cache, shape, 0, 50, 70)
    cache.reach(390)
    assert cache.held == 400  # no further than the capacity
    for slot, want in ((0, torch.cat([first, more])), (2, second)):
        made = cache.prefix(slot, range(len(want)))
        assert torch.equal(made.keys[0], want) and torch.equal(made.values[0], -want)
    assert not cache.keys[0][0, :, 120:].any() and not cache.values[0][2, :, 9:].any()
    cache.move(2, 0, 9)
    cache.fit(9)
    assert cache.held == 32
    assert torch.equal(cache.prefix(0, range(9)).keys[0], second)
    cache.fit(100)
    cache.fit(65)
    assert cache.held == 128  # what is spare is little
    cache.fit(64)
    assert cache.held == 64
    assert all(store.is_contiguous() for store in (*cache.keys, *cache.values))


def test_keys_and_values_side_by_side_go_where_they_go_apart(shape: Shape) -> None:
    apart, together = (Cache(shape, 3, 90, torch.device("cpu"), torch.float32) for _ in range(2))
    slots, positions = torch.tensor([2, 0, 2]), torch.tensor([40, 3, 41])
    k_tnd, v_tnd = (torch.randn(3, shape.kv_heads, shape.head_dim) for _ in range(2))
    for cache in (apart, together):
        cache.reach(60)
    apart.put(1, apart.places(slots, positions), k_tnd, v_tnd)
    together.put_pairs(1, together.pair_places(slots, positions), torch.cat([k_tnd, v_tnd], 1))
    for mine, other in ((together.keys, apart.keys), (together.values, apart.values)):
        assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
    assert torch.equal(together.keys[1][2, :, 41], k_tnd[2]) and torch.equal(together.values[1][0, :, 3], v_tnd[1])


def test_elsewhere_than_on_a_cpu_stores_stay_as_they_are(shape: Shape) -> None:
    cache = Cache(shape, 2, 200, torch.device("meta"), torch.float32)
    cache.reach(10)
    cache.fit(10)
    assert cache.held == 200 and cache.keys[0].shape[2] == 200
