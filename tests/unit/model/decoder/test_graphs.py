"""What graphs do with gradients; capturing itself needs a GPU (benchmarks/gpu_parity.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from test_architectures import load, make

from luthier.config.adapter import Lora
from luthier.model.decoder.graphs import Graphs


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
