"""A few of each fault on real `luthier train` processes; `make test-faults` runs hundreds and prints the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DRIVE = Path(__file__).with_name("drive.py")
MAIN = "from luthier.cli import main; main()"
SIGNAL = f"""
import signal, sys
sys.path.insert(0, {str(DRIVE.parent)!r})
import children
children.signal_in("step", signal.SIGTERM, 5)()
"""


@pytest.mark.parametrize(("engine", "only"), [("decoder", ()), ("generic", ("kills", "resumes"))])
def test_a_run_survives(engine: str, only: tuple[str, ...], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    jobs = str(min(2, os.cpu_count() or 1))  # faults wait as often as they work
    command = [sys.executable, str(DRIVE), *only, "--engine", engine, "--jobs", jobs, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert figures.is_file(), done.stderr[-3000:]
    rows = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    skipped = [row for row in rows if not row["asked"]]  # says why, as where mounting takes root
    assert len(rows) - len(skipped) >= 3 and all("skipped" in row["notes"][0] for row in skipped)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["what"] for row in rows if row["held"] != row["asked"]] == []


def test_processes_that_inherit_nothing_give_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """The children above are forked from one process; these begin with nothing, each with its own hash of strings.

    One trains to its end, another is ended in its fifth step and a third goes on: the same files, byte for byte.
    """
    rows = [f"what is {i} and {i * 7}?,{'yes ' * (1 + i % 5)}{i}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["question,answer", *rows]) + "\n", encoding="utf-8")
    trainer = {"train_steps": 9, "batch_size": 4, "steps_per_checkpoint": 3, "eval_generation_rows": 0,
               "steps_per_evaluation": 3, "early_stop": -1, "learning_rate": 3e-3, "keep_last": 9}  # fmt: skip
    config = {
        "base_model": str(tiny_llama), "dataset": "rows.csv", "prompt": {"template": "{question}\n"},
        "adapter": {"type": "lora", "r": 4, "dropout": 0.1}, "trainer": trainer, "execution": {"device": "cpu"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")

    def luthier(run: str, seed: int, before: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", before + MAIN, "train", "config.yaml", "--output", run]
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        out, both = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=both, text=True)

    def ended(process: subprocess.Popen[str], code: int) -> str:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == code, said
        return said

    def files(run: str) -> dict[str, str]:
        manifests = {path.parent: json.loads(path.read_text()) for path in (tmp_path / run).rglob("manifest.json")}
        return {str((folder / name).relative_to(tmp_path / run)): known["sha256"]
                for folder, made in manifests.items() for name, known in made["files"].items()}  # fmt: skip

    at_once = luthier("straight", 1)
    ended(luthier("broken", 2, SIGNAL), 128 + signal.SIGTERM)
    assert "going on from step 5" in ended(luthier("broken", 3), 0)
    ended(at_once, 0)
    straight, broken = files("straight"), files("broken")
    assert {"checkpoints/step-000009/weights.safetensors", "adapter/adapter_model.safetensors"} <= straight.keys()
    assert {name: broken.get(name) for name in straight} == straight  # all but the fifth step's, which it alone has
