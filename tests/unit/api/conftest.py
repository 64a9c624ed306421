"""Ludwig's own shape of a config and a frame, on the tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from luthier.api import LudwigModel, TrainingResults


@pytest.fixture(scope="module")
def settings(tiny_llama: Path) -> dict[str, Any]:
    return {
        "model_type": "llm",
        "base_model": str(tiny_llama),
        "input_features": [{"name": "instruction", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "prompt": {"template": "{instruction}\n{input}\n"},
        "adapter": {"type": "lora", "r": 4},
        "generation": {"max_new_tokens": 3},
        "trainer": {"type": "finetune", "epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
    }


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """30 rows of one instruction with differing inputs, as instruction data often is; 22 train, 4 and 4 held out."""
    words = ("apple", "river", "stone", "candle", "window", "garden", "mirror", "ladder", "pepper", "saddle")
    rows = [{"instruction": "Say it.", "input": f"{w} {i}", "output": f"{w}!"} for i in range(3) for w in words]
    return pd.DataFrame(rows).assign(split=[0] * 22 + [1] * 4 + [2] * 4)


@pytest.fixture(scope="module")
def trained(
    settings: dict[str, Any], frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LudwigModel, TrainingResults]]:
    """A model that was trained once, and what `train` returned; its run folder is ``results/run-0``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("ludwig"))
    try:
        model = LudwigModel(config=settings)
        yield model, model.train(dataset=frame)
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
