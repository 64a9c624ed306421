"""The notebooks in a real kernel: every cell, then every cell again, on the tiny model in place of the embedded one."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import time
import venv
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# After each pass: the process's memory, and the models that are alive. A model that is kept shows here, however small.
MEASURE = """
import gc, json, psutil
gc.collect()
alive = [m for m in gc.get_objects() if type(m).__name__ in ("Decoder", "LlamaForCausalLM")]
print("MEASURED", json.dumps({"rss": psutil.Process().memory_info().rss, "models": len(alive)}))
del alive
"""


def _cells(path: Path, base: Path) -> list[Any]:
    """The code cells, without the installation, on another base model."""
    import nbformat

    book = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert sources[0].count("%pip") == 2, "the first cell installs"
    tiny = f'"base_model": {json.dumps(str(base))}'
    changed = [source.replace('"base_model": "smollm2"', tiny) for source in sources[1:]]
    assert any(str(base) in source for source in changed)
    return [nbformat.v4.new_code_cell(source) for source in [*changed, MEASURE, *changed, MEASURE]]


def _text(cell: Any) -> str:
    out = []
    for output in cell["outputs"]:
        assert output["output_type"] != "error", output
        data = output.get("data", {})
        out.append(output.get("text", "") + data.get("text/plain", ""))
    return "".join(out)


@pytest.mark.parametrize("name", ["colab_seed.ipynb", "own_csv.ipynb"])
def test_a_notebook_runs_twice(name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = nbformat.v4.new_notebook(cells=_cells(ROOT / "notebooks" / name, tiny_llama))
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
    cells = json.loads((ROOT / "notebooks" / "own_csv.ipynb").read_text(encoding="utf-8"))["cells"]
    install, *rest = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

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
