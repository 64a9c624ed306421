"""No loader runs what a file says: a canary is thrown at each, and a lint rule holds the code."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import assets, config, pipeline
from luthier.assets.tokenizer import Tokenizer
from luthier.data import sources
from luthier.data.sources.formats import FORMATS
from luthier.errors import LuthierError
from luthier.run import RunFolder
from luthier.run.mirror import Mirror
from luthier.run.verify import verify
from luthier.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "executed")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that must not come to be; the canary itself works."""
    path = tmp_path / "trace"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.read_text() == "executed"
    path.unlink()
    return path


def forms(trace: Path, folder: Path) -> list[bytes]:
    """The canary as a plain pickle and in torch's zip and legacy formats."""
    out = [pickle.dumps(Canary(trace), protocol) for protocol in (0, 2, 5)]
    for zipped in (True, False):
        torch.save({"x": Canary(trace)}, folder / "x", _use_new_zipfile_serialization=zipped)
        out.append((folder / "x").read_bytes())
    return out


def refused(load: Callable[[], Any]) -> None:
    with pytest.raises(LuthierError):
        load()


@pytest.mark.parametrize("suffix", [*FORMATS, ".pkl", ".pickle", ".npy", ".pt"])
def test_datasets(suffix: str, trace: Path, tmp_path: Path) -> None:
    for number, content in enumerate(forms(trace, tmp_path)):
        path = tmp_path / f"rows-{number}{suffix}"
        path.write_bytes(content)
        with contextlib.suppress(LuthierError):  # a text format may take a text pickle for a table of text
            sources.read(path)
        assert not trace.exists()


def test_values_in_memory_are_values(trace: Path) -> None:
    refused(lambda: sources.read([{"a": Canary(trace)}, {"a": 1}]))
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
)
def test_bases(name: str, tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    for number, content in enumerate(forms(trace, tmp_path)):
        folder = shutil.copytree(tiny_llama, tmp_path / f"base-{number}")
        (folder / name).write_bytes(content)
        (folder / "pytorch_model.bin").write_bytes(content)  # beside them, pickled weights are not looked at
        with contextlib.suppress(LuthierError):
            base = assets.resolve(str(folder), cache=tmp_path / "cache")
            Tokenizer.load(base.path)
        assert not trace.exists()
    (folder / "model.safetensors").unlink()
    refused(lambda: assets.resolve(str(folder), cache=tmp_path / "cache"))
    refused(lambda: assets.convert_pickled(folder))
    assert not trace.exists()


@pytest.mark.parametrize("loaded", ["auto_map", "tokenizer_class", "custom_pipelines"])
def test_a_base_with_code_of_its_own(loaded: str, tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    """A hostile config.json and the module it names: refused, or read without it; never run."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').write('executed')\nclass Evil: pass\n")
    target = "tokenizer_config.json" if loaded == "tokenizer_class" else "config.json"
    found = json.loads((folder / target).read_text())
    hostile = {
        "auto_map": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        "tokenizer_class": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        "custom_pipelines": {"custom_pipelines": {"text": {"impl": "evil.Evil", "pt": ["Evil"]}}},
    }[loaded]
    (folder / target).write_text(json.dumps(found | hostile))
    rows = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
    settings = config.load({
        "base_model": str(folder), "trainer": {"train_steps": 1, "precision": "fp32", "eval_generation_rows": 0},
        "execution": {"device": "cpu", "model": "generic"},
    })  # fmt: skip
    with contextlib.suppress(LuthierError):
        pipeline.train(settings, rows, output=tmp_path / "run")
    assert not trace.exists()


def test_runs(tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    rows = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
    trainer = {"train_steps": 2, "steps_per_checkpoint": 1, "precision": "fp32", "eval_generation_rows": 0}
    settings = {"base_model": str(tiny_llama), "trainer": trainer, "execution": {"device": "cpu"}}
    made = pipeline.train(config.load(settings), rows, output=tmp_path / "run", mirror=str(tmp_path / "mirror")).folder
    victims = [path.relative_to(made) for path in made.rglob("*") if path.is_file() and path.name != ".writing"]
    assert {path.name for path in victims} >= {"run.json", "state.json", "adapter_model.safetensors", "metrics.jsonl"}
    for content in (forms(trace, tmp_path)[i] for i in (0, 2, 3)):
        for victim in victims:
            hurt = shutil.copytree(made, tmp_path / "hurt")
            (hurt / victim).write_bytes(content)
            for read in (
                lambda: pipeline.load(tmp_path / "hurt"),
                lambda: verify(RunFolder.load(tmp_path / "hurt")),
                lambda: [checkpoint.load(tmp_path / "hurt" / "checkpoints", step) for step in (1, 2)],
            ):
                with contextlib.suppress(LuthierError, ValueError, KeyError):
                    read()
            assert not trace.exists(), victim
            shutil.rmtree(hurt)
        for path in (tmp_path / "mirror").rglob("*"):
            if path.is_file():
                path.write_bytes(content)
        Mirror(str(tmp_path / "mirror"), lambda _: None).restore(tmp_path / "new")
        assert not trace.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_configs(tag: str, trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"base_model: {tag} ['touch {trace}']\n")
    refused(lambda: config.load(path))
    assert not trace.exists()


def test_the_lint_rule_bites(tmp_path: Path) -> None:
    bad = "import pickle\nimport numpy as np\n\nnp.load('x')\npickle.loads(b'')\neval('1')\n"
    command = [str(Path(sys.executable).parent / "ruff"), "check", "--output-format", "concise", "--stdin-filename"]
    done = subprocess.run([*command, "src/luthier/x.py", "-"], input=bad, capture_output=True, text=True, cwd=ROOT)
    assert {"TID251", "S301", "S307"} <= {line.split()[1] for line in done.stdout.splitlines() if ".py:" in line}


def test_torch_load_is_called_with_weights_only() -> None:
    """In code that is text, too: the child process that converts pickled weights is given its program so."""
    found = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    calls = re.findall(r"torch\.load\(([^)]*)\)", found)
    assert calls and all("weights_only=True" in call for call in calls)
