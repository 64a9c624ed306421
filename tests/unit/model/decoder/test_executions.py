"""Every way of executing a step gives the same gradients: the plan changes time and memory, never the math.

In fp64 on a small Llama, against plain micro-steps; a deliberately broken mask must be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import examples, load, make

from luthier.config.adapter import Lora
from luthier.data.collate import collate
from luthier.kernels import attention
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.types import Example

Way = Callable[[Decoder], list[list[Example]]]
SECTION = Lora(r=3, dropout=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llama")
    make(where, "llama")
    return where


def gradients(decoder: Decoder, passes: list[list[Example]], step: int = 5) -> torch.Tensor:
    """Of one effective batch cut into these passes: the weighted mean over supervised tokens."""
    decoder.train()
    total = sum(sum(row.weights[1:]) for rows in passes for row in rows)
    for rows in passes:
        batch = collate(rows, step)
        weight = batch.target_weight[batch.supervised].double()
        (-(decoder.logprobs(batch) * weight).sum() / total).backward()
    found = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    decoder.zero_grad()
    return found


def adapted(folder: Path, section: Lora = SECTION, **how: Any) -> Decoder:
    decoder = load(folder, **how)
    decoder.adapt(section, seed=7)
    generator = torch.Generator().manual_seed(1)
    for pair in decoder.pairs:
        pair.lora_B.data.normal_(std=0.3, generator=generator)
    return decoder


def one_by_one(decoder: Decoder) -> list[list[Example]]:
    return [[row] for row in examples() if row.length > 1]


def packed(decoder: Decoder) -> list[list[Example]]:
    return [examples()]


def in_pairs(decoder: Decoder) -> list[list[Example]]:
    rows = examples()
    return [rows[:2], rows[2:]]


def backwards(decoder: Decoder) -> list[list[Example]]:
    return [examples()[::-1]]


def recomputed(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, recompute_layers=2)
    return [examples()]


def offloaded(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, recompute_layers=3, offload=True)
    return [examples()]


def small_chunks(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, loss_chunk=3)
    return [examples()]


def rounded_up(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, multiple=16)
    return in_pairs(decoder)


def in_tiles(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, mlp_tile=5)
    return [examples()]


def in_tiles_of_recomputed_layers(decoder: Decoder) -> list[list[Example]]:
    decoder.execution = replace(decoder.execution, mlp_tile=7, recompute_layers=2)
    return [examples()]


TILED: list[Way] = [in_tiles, in_tiles_of_recomputed_layers]
WAYS: list[Way] = [packed, in_pairs, backwards, recomputed, offloaded, small_chunks, rounded_up, *TILED]


@pytest.mark.parametrize("target", ["down_proj", "gate_proj", "q_proj"])
@pytest.mark.parametrize("way", TILED, ids=lambda way: way.__name__)
def test_tiles_reach_what_is_trained_wherever_it_is(folder: Path, way: Way, target: str) -> None:
    """With an adapter in the first feed-forward layer alone, what enters it needs no gradient."""
    decoder = adapted(folder, Lora(r=3, dropout=0.25, target_modules=[target]))
    want = gradients(decoder, one_by_one(decoder))
    got = gradients(decoder, way(decoder))
    assert len(want) == len(got) and float(want.abs().max()) > 0
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)


def test_passes_are_rounded_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length that products see is a multiple; what is added is one sample, and its rows come last."""
    decoder = adapted(folder)
    decoder.execution = replace(decoder.execution, multiple=16)
    seen: list[tuple[int, tuple[int, ...], list[int]]] = []
    run = decoder.run

    def watched(x_th: torch.Tensor, now: Any) -> torch.Tensor:
        assert now.keep is not None
        seen.append((len(x_th), now.spans.queries, now.keep.tolist()))
        return run(x_th, now)

    monkeypatch.setattr(decoder, "run", watched)
    batch = collate(examples(), 5)
    assert batch.supervised is not None and batch.source is not None
    assert len(decoder.logprobs(batch)) == len(batch.supervised)
    ((tokens, lengths, keep),) = seen
    assert tokens % 16 == 0 and tokens - len(batch.ids) < 16 and sum(lengths) == tokens
    assert lengths[:-1] == batch.lengths and len(keep) % 16 == 0 and len(set(keep)) == len(keep)
    assert keep[: len(batch.source)] == batch.source.tolist()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["lora with dropout", "full"])
def test_gradients_do_not_depend_on_the_execution(folder: Path, way: Way, kind: str) -> None:
    decoder = load(folder, trained=True) if kind == "full" else adapted(folder)
    want = gradients(decoder, one_by_one(decoder))
    got = gradients(decoder, way(decoder))
    assert float((got - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("placed", [{"weights": "streamed"}, {"embeddings": "host"}], ids=str)
def test_gradients_do_not_depend_on_where_weights_lie(folder: Path, placed: dict[str, str]) -> None:
    want = gradients(adapted(folder), [examples()])
    got = gradients(adapted(folder, **placed), [examples()])
    assert float((got - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_resident_quantised_and_streamed_4_bit_are_the_same_values(folder: Path, kind: str) -> None:
    found = []
    for weights in ("resident", "quantised", "streamed"):
        shape = read_shape(folder)
        decoder = load_decoder(folder, shape, Placing(torch.float32, quantised=kind, weights=weights))  # type: ignore[arg-type]
        decoder.adapt(SECTION, seed=7)
        found.append(gradients(decoder, [examples()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_dropout_draws_anew_each_step_and_not_in_evaluation(folder: Path) -> None:
    decoder = adapted(folder)
    assert not torch.equal(gradients(decoder, [examples()], step=1), gradients(decoder, [examples()], step=2))
    decoder.eval()
    plain = adapted(folder, Lora(r=3)).eval()
    torch.testing.assert_close(decoder.logprobs(collate(examples(), 1)), plain.logprobs(collate(examples(), 1)))


def test_a_broken_mask_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = adapted(folder)
    want = gradients(decoder, one_by_one(decoder))
    one = attention.spans

    def leaking(lengths: Any, device: Any, parents: Any = None) -> attention.Spans:
        return one([sum(lengths)], device)  # all samples as one

    monkeypatch.setattr(attention, "spans", leaking)
    got = gradients(decoder, [examples()])
    assert float((got - want).norm() / want.norm()) > 1e-3


def test_a_wrong_scale_is_noticed(folder: Path) -> None:
    decoder = adapted(folder)
    want = gradients(decoder, one_by_one(decoder))
    got = gradients(decoder, [examples()[:3]]) + gradients(decoder, [examples()[3:]])  # each divided by its own weight
    assert float((got - want).norm() / want.norm()) > 1e-3


@pytest.mark.parametrize("way", [recomputed, *TILED], ids=lambda way: way.__name__)
@pytest.mark.parametrize("layers", [(1,), (2,), (0, 2)])
def test_layers_that_learn_nothing_are_recomputed_where_one_above_or_below_learns(
    folder: Path, way: Way, layers: tuple[int, ...]
) -> None:
    """What enters a layer below the first adapter needs no gradient, and nothing in it does."""
    decoder = adapted(folder, Lora(r=3, dropout=0.25, layers_to_transform=layers))
    want = gradients(decoder, one_by_one(decoder))
    got = gradients(decoder, way(decoder))
    assert len(want) == len(got) and float(want.abs().max()) > 0
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)
