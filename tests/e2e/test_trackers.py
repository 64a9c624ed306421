"""Real trackers, as `luthier[track]` installs them: a training is reported to each and its numbers are read back."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TWICE = """
import json, sys
from luthier import Model
settings = json.load(open("config.yaml"))
for name in ("first", "second"):
    Model(settings, quiet=True).train(output=f"runs/{name}")
print("done")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment over this one that has the extra as well, at the versions of constraints.txt; needs an index."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["track"]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), *extra], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_a_tracker_holds_what_metrics_jsonl_holds(tracker: str, python: Path, tiny_llama: Path, tmp_path: Path) -> None:
    settings = {
        "base_model": str(tiny_llama),
        "prompt": {"template": "{text}\n"},
        "input_features": [{"name": "text"}],
        "output_features": [{"name": "label"}],
        "dataset": "rows.csv",
        "trainer": {"batch_size": 8, "epochs": 2, "precision": "fp32", "eval_generation_rows": 2, "track": [tracker]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    rows = "".join(f"parcel {i},answer {i}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows, encoding="utf-8")
    env = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(python), *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    main = "from luthier.cli import main; main()"
    shown = run("-c", main, "train", "config.yaml", "--output", "runs/alone", "--json")
    assert json.loads(shown)["run"] == "runs/alone", "a tracker that greets on stdout would spoil the JSON"
    assert run("-c", TWICE).splitlines()[-1] == "done", "one process trains twice"

    found = json.loads(run(str(Path(__file__).with_name("read_tracked.py")), tracker, str(tmp_path)))
    assert set(found) == {"alone", "first", "second"}
    for name, metrics in found.items():
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
        written = [json.loads(line) for line in lines]
        for split, key in (("train", "loss"), ("train", "learning_rate"), ("validation", "perplexity")):
            wanted = [pytest.approx([one["step"], one[key]], rel=1e-6) for one in written if one["split"] == split]
            assert wanted and metrics[f"{split}/{key}"] == wanted, (name, split, key)
