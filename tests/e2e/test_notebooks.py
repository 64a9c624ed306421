"""The notebooks in a real kernel: every cell, then every cell again, on the tiny model in place of the embedded one."""

from __future__ import annotations

import asyncio
import json
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
