"""No loader runs what a file says: a canary is thrown at each, and a lint rule holds the code."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import assets, config, events, pipeline
from luthier.assets.gguf import gguf_hash
from luthier.assets.tokenizer import Tokenizer
from luthier.data import sources
from luthier.data.sources import hub
from luthier.data.sources.formats import FORMATS
from luthier.errors import DataError, LuthierError
from luthier.run import RunFolder
from luthier.run.mirror import Mirror
from luthier.run.verify import verify
from luthier.train import checkpoint
from luthier.tuned.bulk import predict_into

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
TRAINER = {"train_steps": 1, "precision": "fp32", "eval_generation_rows": 0}


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


def gguf() -> bytes:
    """The smallest file that passes for one: what it becomes, these tests put into the cache themselves."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = (text(f"llama.{name}") + struct.pack("<II", 4, 1) for name in ("block_count", "embedding_length"))
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), *numbers]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 1, 1, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys) + tensor + bytes(64)


def test_a_gguf_file(trace: Path, tmp_path: Path) -> None:
    """A pickle of that name, and one behind what a library looks for."""
    for content in forms(trace, tmp_path):
        for begin in (b"", b"GGUF", gguf()):
            (tmp_path / "base.gguf").write_bytes(begin + content)
            refused(lambda: assets.resolve(str(tmp_path / "base.gguf"), cache=tmp_path / "cache"))
            assert not trace.exists()


def test_what_lies_in_the_cache(tiny_llama: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base that was converted from GGUF, and of a training: any of its files may be another's by now."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base.gguf").write_bytes(gguf())
    shutil.copytree(tiny_llama, tmp_path / "cache" / "bases" / gguf_hash(tmp_path / "base.gguf"))
    settings = config.load({
        "base_model": str(tmp_path / "base.gguf"), "trainer": TRAINER, "execution": {"device": "cpu"},
    })  # fmt: skip
    pipeline.train(settings, ROWS, output=tmp_path / "run")
    victims = [path.relative_to(tmp_path) for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.parts[1] for path in victims} == {"bases", "hashes", "prepared"}
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    for number, content in enumerate(forms(trace, tmp_path)[i] for i in (0, 3)):
        for victim in victims:
            shutil.rmtree(tmp_path / "cache")
            shutil.copytree(tmp_path / "whole", tmp_path / "cache")
            (tmp_path / victim).write_bytes(content)
            with contextlib.suppress(LuthierError):
                if victim.parts[1] == "bases":
                    pipeline.train(settings, ROWS, output=tmp_path / f"run-{number}-{victim.name}")
                else:  # hashes and tokenised rows: read before a model is opened
                    pipeline.check(settings, ROWS)
            assert not trace.exists(), victim


def test_an_adapter_of_elsewhere(tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base_model": str(tiny_llama), "trainer": TRAINER, "execution": {"device": "cpu"}}
    adapter = pipeline.train(config.load(given), ROWS, output=tmp_path / "run").folder / "adapter"
    hurt = tmp_path / "hurt"
    going_on = config.load({**given, "adapter": {"type": "lora", "pretrained_adapter_weights": str(hurt)}})
    for number, content in enumerate(forms(trace, tmp_path)[i] for i in (0, 3)):
        for name in ("adapter_config.json", "adapter_model.safetensors", "only adapter_model.bin"):
            assert name.startswith("only") or (adapter / name).is_file()
            shutil.copytree(adapter, hurt)
            (hurt / "adapter_model.bin").write_bytes(content)  # what PEFT would take where there are no safetensors
            (hurt / name).write_bytes(content)
            if name.startswith("only"):
                (hurt / "adapter_model.safetensors").unlink()
            with contextlib.suppress(LuthierError):
                pipeline.train(going_on, ROWS, output=tmp_path / f"{number}-{name}")
            assert not trace.exists(), name
            shutil.rmtree(hurt)


def test_a_journal_of_predictions(tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    """All of it, and a line after an honest beginning."""
    given = {"base_model": str(tiny_llama), "trainer": TRAINER, "execution": {"device": "cpu"}}
    settings = config.load({**given, "generation": {"max_new_tokens": 2}})
    tuned = pipeline.train(settings, ROWS, output=tmp_path / "run").tuned
    answers, journal = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        predict_into(answers, tuned, ROWS, sink=interrupting)
    head = journal.read_bytes().splitlines(keepends=True)[0]
    for content in forms(trace, tmp_path):
        for begin in (b"", head):
            journal.write_bytes(begin + content + b"\n")
            with contextlib.suppress(LuthierError):
                predict_into(answers, tuned, ROWS)
            assert not trace.exists()


def interrupting(event: events.Event) -> None:
    if isinstance(event, events.Progress) and event.completed:
        raise KeyboardInterrupt


@pytest.mark.parametrize("beside", [None, "rows.csv"])
def test_a_dataset_with_a_script(
    beside: str | None, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `datasets` itself, as a dataset of the hub without plain files would come to it."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    script = Path("owner/name/name.py")
    script.parent.mkdir(parents=True)
    script.write_text(
        f"import datasets, pathlib\npathlib.Path({str(trace)!r}).write_text('executed')\n\n\n"
        "class Name(datasets.GeneratorBasedBuilder):\n    def _info(self):\n        return datasets.DatasetInfo()\n"
    )
    if beside is not None:
        (script.parent / beside).write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        hub._through_datasets("owner/name", None, None)
    with contextlib.suppress(LuthierError):
        sources.read("owner/name")
    assert not trace.exists()
    runpy.run_path(str(script))
    assert trace.exists(), "the script does what it would have done"


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
    generic = {"device": "cpu", "model": "generic"}
    settings = config.load({"base_model": str(folder), "trainer": TRAINER, "execution": generic})
    with contextlib.suppress(LuthierError):
        pipeline.train(settings, ROWS, output=tmp_path / "run")
    assert not trace.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_the_callers_flag_alone_lets_code_run(
    trusted: bool, tiny_llama: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it the same base trains by its own code: the canary of the test above is alive."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).write_text('executed')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    pass\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | own))
    settings = config.load({
        "base_model": str(folder), "trainer": TRAINER, "execution": {"device": "cpu", "model": "generic"},
    })  # fmt: skip
    allowed = contextlib.nullcontext() if trusted else pytest.raises(LuthierError, match="--trust-remote-code")
    with allowed:
        pipeline.train(settings, ROWS, output=tmp_path / "run", trust_remote_code=trusted)
    assert trace.exists() == trusted == (tmp_path / "run" / "adapter").is_dir()


def test_runs(tiny_llama: Path, trace: Path, tmp_path: Path) -> None:
    trainer = {**TRAINER, "train_steps": 2, "steps_per_checkpoint": 1}
    settings = {"base_model": str(tiny_llama), "trainer": trainer, "execution": {"device": "cpu"}}
    made = pipeline.train(config.load(settings), ROWS, output=tmp_path / "run", mirror=str(tmp_path / "mirror")).folder
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
    bad = (
        "import marshal\nimport pickle\nimport numpy as np\nimport torch\n\n"
        "np.load('x')\npickle.loads(b'')\neval('1')\ntorch.load('x')\nmarshal.loads(b'')\n"
    )
    command = [str(Path(sys.executable).parent / "ruff"), "check", "--output-format", "concise", "--stdin-filename"]
    done = subprocess.run([*command, "src/luthier/x.py", "-"], input=bad, capture_output=True, text=True, cwd=ROOT)
    assert "`torch.load` is banned" in done.stdout
    assert {"TID251", "S301", "S302", "S307"} <= {
        line.split()[1] for line in done.stdout.splitlines() if ".py:" in line
    }


def test_torch_load_is_called_with_weights_only() -> None:
    """In code that is text, too: the child process that converts pickled weights is given its program so."""
    found = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    calls = re.findall(r"torch\.load\(([^)]*)\)", found)
    assert calls and all("weights_only=True" in call for call in calls)
