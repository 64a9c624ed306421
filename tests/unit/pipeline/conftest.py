"""A table of two classes and a run of the whole pipeline on the tiny model, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import config, pipeline


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """40 rows, every fifth `late` and the others `early`; the last eight are validation and test."""
    return [
        {
            "text": f"parcel {i} {'slow' if i % 5 == 0 else 'fast'}",
            "label": "late" if i % 5 == 0 else "early",
            "split": 0 if i < 32 else 1 if i < 36 else 2,
        }
        for i in range(40)
    ]


@pytest.fixture
def settings(tiny_llama: Path) -> dict[str, Any]:
    return {
        "base_model": str(tiny_llama),
        "input_features": [{"name": "text"}],
        "output_features": [{"name": "label", "type": "category"}],
        "prompt": {"template": "{text}\n"},
        "generation": {"max_new_tokens": 6},
        "adapter": {"type": "lora", "r": 4},
        "trainer": {
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "eval_generation_rows": 0,
        },
    }


@pytest.fixture
def train(settings: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., pipeline.Trained]:
    """Train with ``key.path`` = value changes; keys in YAML spelling with __ for the dots."""

    def run(output: str = "run", /, data: Any = None, sink: Any = None, **changes: Any) -> pipeline.Trained:
        import json

        overrides = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]
        made = config.load(settings, overrides)
        options = {"sink": sink} if sink is not None else {}
        return pipeline.train(made, rows if data is None else data, output=tmp_path / output, **options)

    return run
