"""The notebooks in a real kernel: every cell, then every cell again, on a tiny model in place of the one they name."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import time
import tomllib
import venv
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("colab_seed.ipynb", "own_csv.ipynb")
BASES = {"colab_seed.ipynb": ("BASE_MODEL = ", "huggyllama/llama-7b"), "own_csv.ipynb": ('"base_model": ', "smollm2")}
# What the notebook changes in the seed program: where the config, the base and the rows come from.
CHANGED = (
    ("import sys\n", ""),
    ('open(__file__.replace("seed_program.py", "seed_config.yaml"))', "CONFIG"),
    ('if len(sys.argv) > 2:\n    config["base_model"] = sys.argv[2]', 'config["base_model"] = BASE_MODEL'),
    ("sys.argv[1]", "DATA"),
)
# Before all: count the models that are alive whenever a training begins; one that is there takes memory beside it.
WATCH = """
import gc
from luthier.api import model as _api
_train, before = _api.pipeline.train, []
def _counted(*given, **named):
    gc.collect()
    before.append(sum(type(m).__name__ in ("Decoder", "LlamaForCausalLM") for m in gc.get_objects()))
    return _train(*given, **named)
_api.pipeline.train = _counted
"""
# After each pass: the process's memory, and the models that are alive. A model that is kept shows here, however small.
MEASURE = """
import gc, json, psutil
gc.collect()
alive = [m for m in gc.get_objects() if type(m).__name__ in ("Decoder", "LlamaForCausalLM")]
print("MEASURED", json.dumps({"rss": psutil.Process().memory_info().rss, "models": len(alive), "before": before}))
del alive
"""


def _sources(name: str) -> tuple[str, list[str]]:
    """The first code cell, which installs, and the others."""
    book = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
    install, *rest = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert install.count("%pip install") == 2
    return install, rest


def _cells(name: str, base: Path, rows: Path) -> list[Any]:
    """The code cells, without the installation, on another base model and on the rows of this file."""
    import nbformat

    key, named = BASES[name]
    changed = [one.replace(key + json.dumps(named), key + json.dumps(str(base))) for one in _sources(name)[1]]
    changed = [re.sub("^DATA = .*$", f"DATA = {json.dumps(str(rows))}", one, flags=re.M) for one in changed]
    assert sum(str(base) in source for source in changed) == 1, "the base is named in one place"
    return [nbformat.v4.new_code_cell(source) for source in [WATCH, *changed, MEASURE, *changed, MEASURE]]


def _text(cell: Any) -> str:
    out = []
    for output in cell["outputs"]:
        assert output["output_type"] != "error", output
        data = output.get("data", {})
        out.append(output.get("text", "") + data.get("text/plain", ""))
    return "".join(out)


def test_the_seed_notebook_is_the_seed_program_line_for_line() -> None:
    program = (ROOT / "examples" / "seed" / "seed_program.py").read_text(encoding="utf-8").split('"""\n')[1]
    for there, here in CHANGED:
        assert program.count(there) == 1, there
        program = program.replace(there, here)
    _, (config, *cells) = _sources("colab_seed.ipynb")
    written = "\n".join(cells).splitlines()
    known: dict[str, Any] = {}
    exec(config, known)
    published = (ROOT / "examples" / "seed" / "seed_config.yaml").read_text(encoding="utf-8")
    assert known["CONFIG"] == published
    assert f"base_model: {known['BASE_MODEL']}\n" in published
    own = [line for line in written if line.startswith(("#", "DATA = "))]
    assert len(own) == 2, "a remark, and where the rows are"
    assert [line for line in written if line and line not in own] == [line for line in program.splitlines() if line]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_the_package_or_a_checkout(name: str) -> None:
    install, _ = _sources(name)
    lines = install.splitlines()
    first = next(line for line in lines if line.startswith("%pip"))
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    for checkout, wanted in (("", package), ("../here", "../here")):
        known: dict[str, str] = {}
        plain = [line for line in lines if not line.startswith("%")]
        exec("\n".join(plain).replace('CHECKOUT = ""', f"CHECKOUT = {checkout!r}"), known)
        assert first.replace("{LUTHIER}", known["LUTHIER"]) == f"%pip install --quiet {wanted}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_twice(name: str, wider_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    book = nbformat.v4.new_notebook(cells=_cells(name, wider_llama, tmp_path / "rows.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notebook client's own, about event loops
        client = NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
        asyncio.run(client.async_execute())
    texts = [_text(cell) for cell in book["cells"]]
    progress = [text for text in texts if "train loss" in text]
    assert len(progress) == 2, "each pass shows how training goes"
    assert all("left" in text for text in progress)
    first, second = [json.loads(text.split("MEASURED")[1]) for text in texts if "MEASURED" in text]
    assert first["models"] == second["models"] == 1
    assert second["before"] == [0, 0]
    assert abs(second["rss"] - first["rss"]) <= 0.05 * first["rss"]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_first_step_on_a_table_comes_within_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs a package index. As on Colab and Kaggle torch is there before the clock starts, nothing of ours is.

    The real model on two CPU cores, its conversion included; a GPU's steps are faster.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "torch==2.13.0", "pandas"], check=True, timeout=900)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    install, rest = _sources("own_csv.ipynb")

    started = time.time()
    for line in install.splitlines():
        if line.startswith("%pip install"):
            wanted = shlex.split(line.removeprefix("%pip install").replace("{LUTHIER}", str(ROOT)))
            subprocess.run([*pip, *wanted], check=True, timeout=900)
    installed = time.time()
    code = "\n".join(rest[: 1 + next(at for at, cell in enumerate(rest) if ".train(" in cell)])
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path, timeout=600)
    (metrics,) = tmp_path.glob("*/*/metrics.jsonl")
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    assert first["split"] == "train" and first["step"] == 1
    took = first["time"] - started
    print(f"first step after {took:.0f} s, of which the installation took {installed - started:.0f} s")
    assert took < 300
