"""What graphs do with gradients; capturing itself needs a GPU (benchmarks/gpu_parity.py)."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_architectures import load, make

from luthier.config.adapter import Lora
from luthier.kernels.attention import spans
from luthier.model.decoder.decoder import Execution
from luthier.model.decoder.graphs import Graphs, _Captured, _starts
from luthier.pipeline.decoded import Decoded
from luthier.types import Plan


def test_gradients_of_earlier_passes_are_kept(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    decoder = load(tmp_path)
    decoder.adapt(Lora(r=2), seed=1)
    graphs = Graphs(list(decoder.layers)[:-1], torch.device("cpu"))  # type: ignore[arg-type]
    assert graphs.parameters and all(parameter.requires_grad for parameter in graphs.parameters)

    graphs.collect()  # a step begins: whatever the last one left is gone
    assert all(not parameter.grad.any() for parameter in graphs.parameters)
    for parameter in graphs.parameters:
        parameter.grad += 1.0  # what a replayed backward pass does
    graphs.collect()  # the next pass of the same step
    assert all(bool((parameter.grad == 1).all()) for parameter in graphs.parameters)

    decoder.zero_grad(set_to_none=True)
    for parameter in graphs.parameters:
        parameter.grad = torch.full_like(parameter, 3.0)  # a pass that ran without a graph
    graphs.collect()
    for parameter in graphs.parameters:
        parameter.grad += 1.0
    assert all(bool((parameter.grad == 4).all()) for parameter in graphs.parameters)


def test_a_graph_with_room_serves_smaller_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a rounded length, made again only for more samples or a longer one than any before had."""
    make(tmp_path, "llama")
    decoder = load(tmp_path)
    decoder.adapt(Lora(r=2), seed=1)
    graphs = Graphs(list(decoder.layers)[:-1], torch.device("cpu"))  # type: ignore[arg-type]
    made: list[tuple[int, int, int]] = []

    def capture(padded: int, x_th: torch.Tensor, now: Any) -> _Captured:
        made.append((padded, graphs._samples, graphs._longest))
        length, count = graphs._longest, graphs._samples
        room = SimpleNamespace(spans=SimpleNamespace(queries=(length,) * count, longest=length))
        return _Captured(room, x_th, x_th, x_th, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "_capture", capture)

    def ask(*lengths: int) -> _Captured:
        now = SimpleNamespace(spans=spans(lengths, torch.device("cpu")), key_t=None)
        found = graphs._for(torch.zeros(sum(lengths), 8), now)  # type: ignore[arg-type]
        sums = _starts(now.spans, len(found.now.spans.queries) + 1)
        assert sums[: len(lengths) + 1].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert set(sums[len(lengths) + 1 :].tolist()) <= {sum(lengths)}  # empty samples follow
        return found

    first = ask(60, 50, 18)
    assert made == [(128, 4, 128)]
    assert ask(128) is first and ask(28, 100) is first
    ask(30, 30, 30, 30, 8)
    assert made[1:] == [(128, 8, 128)]
    ask(200, 56)
    assert made[2:] == [(256, 8, 256)]
    ask(60, 68)  # the graph of that length has room for it, though the newest has more
    assert len(made) == 3


def test_the_largest_graph_is_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "llama")
    decoder = load(tmp_path)
    decoder.adapt(Lora(r=2), seed=1)
    graphs = Graphs(list(decoder.layers)[:-1], torch.device("cpu"), largest=512)  # type: ignore[arg-type]
    made: list[int] = []

    def capture(padded: int, x_th: torch.Tensor, now: Any) -> _Captured:
        made.append(padded)
        room = SimpleNamespace(spans=SimpleNamespace(queries=(128,) * 8, longest=128))
        return _Captured(room, x_th, x_th, x_th, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "_capture", capture)
    for length in (128, 512, 128):
        now = SimpleNamespace(spans=spans((128,) * (length // 128), "cpu"), key_t=None)
        graphs._for(torch.zeros(length, 8), now)  # type: ignore[arg-type]
    assert made == [512, 128]


def test_graphs_of_another_execution_are_dropped(tmp_path: Path) -> None:
    """Their pool holds the activations of the largest pass, which is what memory ran out with."""
    make(tmp_path, "llama")
    decoder = load(tmp_path)
    decoder.adapt(Lora(r=2), seed=1)
    first = Execution(graphs=True, tokens=512, multiple=128)
    decoder.execute(first)
    graphs = decoder._graphs_for()
    decoder.execute(replace(first))
    assert decoder._graphs_for() is graphs
    gone = weakref.ref(graphs)
    del graphs
    decoder.execute(replace(first, tokens=256))
    assert gone() is None and decoder._graphs_for().largest == 256
    Decoded(decoder, None, "adapter").adopt(Plan("cuda:0", 256, "decoder", graphs=False))  # type: ignore[arg-type]
    assert decoder._graphs is None and not decoder.execution.graphs
