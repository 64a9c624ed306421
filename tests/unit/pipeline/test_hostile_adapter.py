"""An adapter_config.json that is out to hurt: refused before PEFT reads it, and nothing of it is run."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from luthier import config, pipeline
from luthier.assets.adapter_bounds import check_adapter
from luthier.errors import AssetError, LuthierError

BOMB = "(([a-z_.0-9])+.)+!"


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training(tiny_llama, tmp_path_factory.mktemp("made"), None)


def training(base: Path, folder: Path, adapter: Path | None) -> Path:
    rows = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
    section = {"type": "lora"} | ({"r": 4} if adapter is None else {"pretrained_adapter_weights": str(adapter)})
    settings = config.load({
        "base_model": str(base), "adapter": section, "execution": {"device": "cpu"},
        "trainer": {"train_steps": 1, "precision": "fp32", "eval_generation_rows": 0},
    })  # fmt: skip
    return pipeline.train(settings, rows, output=folder / "run").folder / "adapter"


CASES: tuple[dict[str, Any], ...] = (
    {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    {"megatron_config": {"a": 1}, "megatron_core": "megatron.core.evil"},
    {"target_modules": BOMB}, {"target_modules": "(a|b*)*c"}, {"target_modules": ".*.*.*.*x"},
    {"exclude_modules": BOMB}, {"modules_to_save": [BOMB]}, {"rank_pattern": {BOMB: 4}}, {"alpha_pattern": {BOMB: 4}},
    {"layers_pattern": [BOMB]}, {"target_modules": "("}, {"target_modules": "(" * 5000 + ")" * 5000},
    {"r": 10**9}, {"r": 10**30}, {"r": -1}, {"r": "4"}, {"r": [4]}, {"rank_pattern": {"q_proj": 10**9}},
    {"peft_type": 5}, {"peft_type": "NOSUCH"}, {"peft_type": None}, {"target_modules": 5}, {"lora_alpha": "x"},
    {"lora_alpha": [1]}, {"rank_pattern": 5}, {"bias": 5}, {"target_modules": [{}]}, {"layers_to_transform": "x"},
)  # fmt: skip


@pytest.mark.parametrize("values", CASES, ids=lambda values: str(values)[:50])
def test_hostile_values(
    values: dict[str, Any], made: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made, tmp_path / "adapter")
    (folder / "manifest.json").unlink()  # as one from elsewhere, which has no sums
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').write('executed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(known | values), encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(LuthierError):
        training(tiny_llama, tmp_path, folder)
    assert time.monotonic() - started < 20
    assert not (tmp_path / "trace").exists() and "evil" not in sys.modules


def test_nesting(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000, encoding="utf-8")
    with pytest.raises(AssetError):
        check_adapter(folder)


@pytest.mark.parametrize(
    "pattern", ["all-linear", r".*\.(q_proj|v_proj)$", r".*\.layers\.\d+\.self_attn\..*_proj", r"^(?!.*lm_head).*proj"]
)
def test_ordinary_patterns_pass(pattern: str, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "adapter")
    known = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(known | {"target_modules": pattern}), encoding="utf-8")
    check_adapter(folder)
