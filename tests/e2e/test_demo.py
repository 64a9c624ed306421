"""What `make demo` promises of the shipped dataset and the embedded model, by the demo's own script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_tuned_model_beats_its_base_as_the_demo_promises(tmp_path: Path) -> None:
    """On at least 60 held-out rows: at least 80 % exact, 40 points over the base that is shown three examples."""
    for name in ("scripts/demo.sh", "examples/dictionary/config.yaml", "examples/dictionary/dictionary.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "scripts/demo.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run = tmp_path / "demo" / "run"
    found = json.loads((run / "evaluation.json").read_text("utf-8"))
    scores = {one["name"]: one["scores"]["exact_match"] for one in found["contestants"]}
    assert len(found["rows"]) >= 60
    assert scores["tuned"] >= 0.8
    assert scores["tuned"] - max(scores["base"], scores["base, 3-shot"]) >= 0.4

    commands = re.findall(r"^\S*\$ (luthier .*?)\S*$", done.stdout, re.MULTILINE)
    assert [line.split()[1] for line in commands] == ["train", "evaluate"], "it prints each command that it runs"
    shown = [f"{scores[name]:.3f}" for name in ("base", "base, 3-shot", "tuned")]
    (line,) = (line for line in done.stdout.splitlines() if "exact_match" in line)
    assert re.findall(r"\d\.\d{3}", line) == shown, "side by side, with the numbers"
    seconds = re.search(r"Done in (\d+) min (\d+) s", done.stdout)
    assert seconds, done.stdout[-1000:]
    stages = re.findall(r"^train: done in ([0-9.]+)s", done.stderr, re.MULTILINE)
    print(f"{seconds[0]}, of which training {stages[0]} s; exact match {scores}")
    assert 60 * int(seconds[1]) + int(seconds[2]) <= 8 * 60 and float(stages[0]) <= 3 * 60, "on an idle machine"
