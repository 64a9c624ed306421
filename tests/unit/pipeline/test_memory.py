"""Training twice in one process holds one model's memory, not two."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import luthier

# In a process of its own: other tests' garbage would hide ours.
PROGRAM = """
import gc, sys
import psutil, torch
import luthier
torch.set_num_threads(1)
base, out = sys.argv[1:]
rows = [{"instruction": f"say {i}", "output": f"{i} is said"} for i in range(40)]
settings = {
    "base_model": base, "adapter": None, "generation": {"max_new_tokens": 4},
    "trainer": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
}
model = luthier.Model(settings, quiet=True)
for number in range(3):
    model.train(rows, output=f"{out}/{number}")
    gc.collect()
    print(psutil.Process().memory_info().rss)
"""


@pytest.fixture(scope="module")
def larger_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A model of 24 MB of weights, so that one that stays behind is seen: with gradients and moments, a tenth of all."
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("larger") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = 256, 1024, 64, 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_training_again_ends_within_five_percent_of_the_same_memory(larger_llama: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(larger_llama), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line) for line in done.stdout.split()]
    assert max(sizes[1:]) < 1.05 * sizes[0], sizes


def test_the_first_model_is_gone_when_the_second_is_there(settings, rows, tmp_path: Path) -> None:
    import weakref

    model = luthier.Model(settings, quiet=True)
    model.train(rows, output=tmp_path / "one")
    first = weakref.ref(model._tuned.model.module)
    model.train(rows, output=tmp_path / "two")
    gc.collect()
    assert first() is None
