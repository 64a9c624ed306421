"""A base's config.json that is out to hurt: each ends in an error with a code, soon and in little memory.

Each case is a process of its own with a limit on its memory: what a wrong check lets through may ask for terabytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import assets, config, pipeline
from luthier.errors import AssetError, LuthierError

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "head_dim")  # fmt: skip
NO_SIZES = (10**7, 10**9, 10**30, -1, "7", [], {"a": 1}, 1.5, 1e308, float("nan"), True)
OTHERS: tuple[dict[str, Any], ...] = (
    {"architectures": 5}, {"architectures": {"a": 1}}, {"architectures": [[]]}, {"model_type": 5},
    {"rope_parameters": 5}, {"rope_parameters": []}, {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_parameters": {"rope_type": 5, "rope_theta": -1}}, {"rope_parameters": {"rope_theta": "x"}},
    {"rms_norm_eps": "x"}, {"rms_norm_eps": []}, {"hidden_act": 5}, {"layer_types": 5}, {"layer_types": ["x"]},
    {"layer_types": ["full_attention"] * 100_000}, {"text_config": 5}, {"text_config": {"num_hidden_layers": 10**7}},
    {"auto_map": 5}, {"auto_map": [1]}, {"sliding_window": "x"}, {"sliding_window": -1}, {"attention_dropout": 5},
    {"n_positions": 10**6, "rope_parameters": None, "max_position_embeddings": None, "model_type": "gpt2",
     "architectures": ["GPT2LMHeadModel"]},
)  # fmt: skip


def changed(base: Path, to: Path, values: dict[str, Any]) -> Path:
    folder = shutil.copytree(base, to)
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {key: value for key, value in (known | values).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


@pytest.mark.alone
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_are_none(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    for number, value in enumerate(NO_SIZES):
        folder = changed(tiny_llama, tmp_path / str(number), {name: value})
        started = time.monotonic()
        with pytest.raises(AssetError) as caught:
            assets.resolve(str(folder), cache=tmp_path / "cache")
        assert caught.value.code == "asset-damaged", value
        assert str(folder / "config.json") in str(caught.value) and time.monotonic() - started < 2


@pytest.mark.parametrize("depth", [2_000, 200_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_nesting(name: str, depth: int, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / name).write_text('{"a":' * depth + "1" + "}" * depth, encoding="utf-8")
    with pytest.raises(AssetError):
        base = assets.resolve(str(folder), cache=tmp_path / "cache")
        from luthier.assets.tokenizer import Tokenizer

        Tokenizer.load(base.path)


def ending(work: Callable[[], object], pipe: Any) -> None:
    """In the child: what ``work`` ends with, its code where it is an error of ours."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    try:
        work()
        said = "done"
    except LuthierError as error:
        said = error.code
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    pipe.send((said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    os._exit(0)


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits address space")
@pytest.mark.parametrize("how", ["decoder", "generic"])
def test_values_of_another_kind(how: str, tiny_llama: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    rows = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
    trainer = {"train_steps": 1, "precision": "fp32", "eval_generation_rows": 0}
    for number, values in enumerate(OTHERS):
        folder = changed(tiny_llama, tmp_path / str(number), values)
        execution = {"device": "cpu", "model": "auto" if how == "decoder" else "generic"}
        settings = config.load({"base_model": str(folder), "trainer": trainer, "execution": execution})
        here, there = context.Pipe(duplex=False)
        run = tmp_path / f"run-{number}"
        child = context.Process(
            target=ending, args=(lambda s=settings, r=run: pipeline.train(s, rows, output=r), there)
        )
        started = time.monotonic()
        child.start()
        there.close()
        try:
            said, memory = here.recv() if here.poll(60) else ("60 s were not enough", 0)
        except EOFError:
            said, memory = "the process died", 0
        child.kill()
        child.join()
        fine = said == "done" or said.split("-")[0] == "asset"
        assert fine and memory < 2048 and time.monotonic() - started < 20, (values, said, memory)
