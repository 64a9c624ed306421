"""The main job through the front doors: the command line, both Python interfaces, the seed program unchanged."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import luthier
from luthier import config, events, pipeline
from luthier.api import LudwigModel

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "dictionary" / "dictionary.csv"
WORDS = ("red", "green", "blue", "black", "white", "gold")


def run(*command: str, cwd: Path, code: int = 0) -> str:
    """A command in a new process; its stdout."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def cli(*arguments: str, cwd: Path, code: int = 0) -> Any:
    """A luthier command with --json; its result."""
    return json.loads(run(sys.executable, "-c", "from luthier.cli import main; main()", *arguments, cwd=cwd, code=code))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = random.Random(1)
    rows = [
        {"instruction": "Say it in capitals.", "input": f"{word} {i}", "output": f"{word.upper()} {i}"}
        for i, word in enumerate(draw.choices(WORDS, k=60))
    ]
    path = tmp_path / "rows.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture
def settings(tiny_llama: Path) -> dict[str, Any]:
    return {
        "base_model": str(tiny_llama),
        "trainer": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"},
        "generation": {"max_new_tokens": 8},
        "prompt": {"template": "{instruction} {input}\n"},
    }


def test_train_predict_evaluate_and_runs_on_the_command_line(
    table: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    trained = cli("train", "config.yaml", "--dataset", "rows.csv", "--output", "made", "--json", cwd=tmp_path)
    made = tmp_path / "made"
    assert trained["run"] == "made"
    for name in ("run.json", "config.yaml", "plan.json", "audit.json", "metrics.jsonl", "report.html", "adapter"):
        assert (made / name).exists(), name
    record = json.loads((made / "run.json").read_text("utf-8"))
    assert record["state"] == "finished"
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text("utf-8").splitlines()]
    wanted = {"time", "step", "epoch", "split", "loss", "learning_rate", "tokens_per_s", "supervised_tokens"}
    wanted |= {"memory_gib"}
    assert wanted <= set(lines[0])
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0]

    first = cli("predict", "made", "--dataset", "rows.csv", "--json", cwd=tmp_path)
    again = cli("predict", "-m", "made", "--dataset", "rows.csv", "--json", cwd=tmp_path)
    assert first["rows"] == 60 and first["answers"] == again["answers"]
    base = cli("predict", "made", "--dataset", "rows.csv", "--base", "--json", cwd=tmp_path)
    assert base["answers"] != first["answers"]

    compared = cli("evaluate", "made", "--json", cwd=tmp_path)
    assert [c["name"] for c in compared["contestants"]] == ["base", "base, 3-shot", "tuned"]
    assert (made / "evaluation.json").exists()
    listed = cli("runs", ".", "--json", cwd=tmp_path)
    assert [one["state"] for one in listed["runs"]] == ["finished"]


@pytest.mark.e2e
def test_the_embedded_model_is_tuned_and_says_what_it_does(tmp_path: Path) -> None:
    """A few steps on the shipped dataset, told on the way: what was filled in, and how far each long piece is."""
    table = pd.read_csv(SHIPPED, dtype=str, keep_default_na=False)
    table.loc[0, "input"] += uuid.uuid4().hex  # or they would be taken from the cache of tokenised rows
    rows = pd.concat([table.head(4)] * 4 + [table.iloc[4:8].assign(split=["1", "1", "2", "2"])], ignore_index=True)
    few = {"trainer.train_steps": 3, "trainer.batch_size": 4, "generation.max_new_tokens": 4}
    few |= {"trainer.learning_rate": 1e-3, "preprocessing.split.type": "fixed"}
    told: list[events.Event] = []
    made = pipeline.train(
        config.load({"base_model": "smollm2"}, [f"{key}={value}" for key, value in few.items()]),
        rows, output=tmp_path / "made", sink=told.append,
    )  # fmt: skip
    losses = made.history["train"]["loss"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    notes = [one.text for one in told if isinstance(one, events.Note)]
    assert any(re.fullmatch(r"filled in: adapter\.r = 16 \(Ludwig: 8\)", note) for note in notes), notes
    compared = pipeline.evaluate(made.tuned, rows, rows=4, sink=told.append)
    assert [one.name for one in compared.contestants] == ["base", "base, 3-shot", "tuned"]
    shown = {one.stage for one in told if isinstance(one, events.Progress) and one.total}
    assert shown >= {"tokenise", "load", "train", "evaluate", "generate", "save"}


def test_the_output_folder_keeps_to_its_run(table: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["trainer"]["epochs"] = 1
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = ("train", "config.yaml", "--dataset", "rows.csv", "--output", "made", "--json")
    cli(*command, cwd=tmp_path)
    before = (tmp_path / "made" / "metrics.jsonl").read_text("utf-8")
    cli(*command, cwd=tmp_path)  # finished: says so, trains nothing
    assert (tmp_path / "made" / "metrics.jsonl").read_text("utf-8") == before
    other = cli(*command, "--set", "random_seed=7", cwd=tmp_path, code=5)
    assert other["error"][0]["code"] == "run-other-lock"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine", encoding="utf-8")
    foreign = cli(*command[:5], "foreign", "--json", cwd=tmp_path, code=5)
    assert foreign["error"][0]["code"] == "run-foreign-files"


def test_errors_are_explained_and_leave_with_their_code(settings: dict[str, Any], table: Path, tmp_path: Path) -> None:
    settings["prompt"]["template"] = "{instructio}\n"
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    failed = cli("check", "config.yaml", "--dataset", "rows.csv", "--json", cwd=tmp_path, code=3)
    assert failed["error"][0]["code"] == "data-missing-column"
    assert "instruction" in failed["error"][0]["fix"]
    assert cli("predict", "nowhere", "--dataset", "rows.csv", "--json", cwd=tmp_path, code=5)


def test_init_writes_a_config_that_checks(table: Path, tiny_llama: Path, tmp_path: Path) -> None:
    made = cli("init", "rows.csv", "--base", str(tiny_llama), "--json", cwd=tmp_path)
    assert len(made["bases"]) >= 3
    checked = cli("check", "config.yaml", "--json", cwd=tmp_path)
    assert checked["layout"]["target"] == "output"


def test_the_native_interface_trains_saves_and_loads(table: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    frame = pd.read_csv(table)
    model = luthier.Model(settings, quiet=True)
    model.train(frame, output=tmp_path / "made")
    before = model.predict(frame).texts
    assert "".join(model.stream("Say it in capitals. red 1\n")) == model.generate("Say it in capitals. red 1\n")
    saved = model.save(tmp_path / "kept")
    assert luthier.Model.load(saved, quiet=True).predict(frame).texts == before
    in_a_new_process = cli("predict", str(saved), "--dataset", "rows.csv", "--json", cwd=tmp_path)
    assert [one["response"] for one in in_a_new_process["answers"]] == before


def test_ludwigs_interface_has_ludwigs_shapes(
    table: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.read_csv(table)
    frame["split"] = [0] * 50 + [1] * 5 + [2] * 5
    model = LudwigModel(config=settings)
    stats, rows, directory = model.train(dataset=frame)
    assert stats.training["output"]["loss"] and stats.validation["output"]["loss"]
    assert [len(part) for part in (rows.training_set, rows.validation_set, rows.test_set)] == [50, 5, 5]
    assert Path(directory) == Path("results/run-0")
    answers, _ = model.predict(frame)
    wanted = ["predictions", "response", "probability", "probabilities"]
    assert list(answers.columns) == [f"output_{name}" for name in wanted]
    assert all(0 < one < 1 for one in answers["output_probability"])
    assert all(isinstance(one, list) and len(one) == 1 for one in answers["output_response"])
    scores, _, _ = LudwigModel.load(directory).evaluate(frame, split="test")
    assert 0 <= scores["output"]["exact_match"] <= 1


def test_the_seed_program_runs_unchanged(wider_llama: Path, tmp_path: Path) -> None:
    for name in ("seed_program.py", "seed_config.yaml"):
        shutil.copy(ROOT / "examples" / "seed" / name, tmp_path / name)
    # The config as it stands asks for 5 epochs and 512 tokens an answer; a smaller table keeps the test short.
    rows = [{"instruction": f"Say {w}.", "input": "", "output": w} for w in WORDS for _ in range(7)]
    (tmp_path / "code.json").write_text(json.dumps(rows), encoding="utf-8")
    out = run(sys.executable, "seed_program.py", "code.json", str(wider_llama), cwd=tmp_path)
    answers = re.findall(r"^Generated Output: (.*?)\n\n\n", out, re.MULTILINE | re.DOTALL)
    assert len(answers) == 6 and all(len(answer) > 1 for answer in answers)  # whole strings, not their first letters
    assert (tmp_path / "results" / "run-0" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("override", "code"),
    [("trainer.type=none", "config-conflict"), ("trainer.compile=true", "config-not-implemented")],
)
def test_a_key_that_would_be_ignored_is_refused(
    override: str, code: str, table: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    failed = cli("train", "config.yaml", "--dataset", "rows.csv", "--set", override, "--json", cwd=tmp_path, code=2)
    assert failed["error"][0]["code"] == code
