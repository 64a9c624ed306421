"""A run that shares what its rows start with learns what one learns that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.run import read_metrics


def test_the_same_losses_and_weights_from_fewer_tokens(settings: dict[str, Any], train: Callable[..., Any]) -> None:
    settings["prompt"]["template"] = "Say whether this parcel came late or early.\n{text}\n"
    settings["adapter"] |= {"dropout": 0}
    found = {}
    for share in (True, False):
        done = train(f"run-{share}", execution__share_prefix=share)
        lines = read_metrics(done.folder / "metrics.jsonl")
        trained = [line for line in lines if line["split"] == "train"]
        assert trained and all((line["tokens_computed"] < 0.6 * line["tokens"]) == share for line in trained)
        losses = [(line["split"], line["loss"]) for line in lines]
        found[share] = losses, load_file(done.folder / "adapter" / "adapter_model.safetensors")
    for mine, theirs in zip(found[True][0], found[False][0], strict=True):
        assert mine[0] == theirs[0] and mine[1] == pytest.approx(theirs[1], abs=2e-6)
    for name, weight in found[True][1].items():
        assert float((weight - found[False][1][name]).abs().max()) < 1e-4, name  # Adam divides by small gradients
