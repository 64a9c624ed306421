"""`train --resume`, `train --fork`, `runs verify`; what was changed under a run is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from luthier import config, pipeline
from luthier.cli import runs, train
from luthier.errors import AssetError, RunError
from luthier.events import Stepped
from luthier.run import RunFolder, manifest, read_metrics
from luthier.train import checkpoint


class Crash(Exception):
    pass


@pytest.fixture(params=["decoder", "generic"])
def begun(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder with rows.csv, config.yaml and a run `made` that crashed in its fifth step of six."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    lines = ["question,answer", *(f"say {i},yes {i}" for i in range(20))]
    Path("rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    trainer = {"epochs": 3, "batch_size": 8, "precision": "fp32", "steps_per_checkpoint": 2, "eval_generation_rows": 0}
    settings = {
        "base_model": str(base), "dataset": "rows.csv", "prompt": {"template": "{question}\n"}, "trainer": trainer,
        "execution": {"model": request.param, "device": "cpu"},
        "generation": {"max_new_tokens": 4},  # the report shows answers, and the tiny model never ends one
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(settings), encoding="utf-8")

    begin(Path("config.yaml"), "made")
    return tmp_path


def begin(settings: Path, output: str) -> None:
    """A run that crashes in its fifth step."""

    def crash(event: Any) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise Crash

    with pytest.raises(Crash):
        pipeline.train(config.load(settings), "rows.csv", output=output, sink=crash)


def test_resume_takes_everything_from_the_run(begun: Path) -> None:
    Path("config.yaml").rename("moved.yaml")  # the run has its own
    train.command(resume="made")
    assert RunFolder.load("made").state == "finished"
    train.command(config="moved.yaml", output="straight")
    left, right = (checkpoint.load(Path(name) / "checkpoints", 6) for name in ("made", "straight"))
    assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        assert (Path("made/adapter") / name).read_bytes() == (Path("straight/adapter") / name).read_bytes()
    timed = ("time", "tokens_per_s", "memory_gib")
    lines = [[{k: v for k, v in line.items() if k not in timed} for line in read_metrics(Path(name) / "metrics.jsonl")]
             for name in ("made", "straight")]  # fmt: skip
    assert lines[0] == lines[1] and lines[0]
    with pytest.raises(typer.BadParameter):
        train.command(config="moved.yaml", resume="made")


def test_resume_of_full_fine_tuning_gives_each_weight_its_own_state(begun: Path) -> None:
    """Norms have one size: what the optimizer remembers of one would fit another."""
    settings = json.loads(Path("config.yaml").read_text(encoding="utf-8"))
    for number in range(4):  # an order that differs from load to load may agree by chance
        Path("full.yaml").write_text(json.dumps(settings | {"adapter": None}), encoding="utf-8")
        begin(Path("full.yaml"), f"broken-{number}")
        train.command(resume=f"broken-{number}")
    train.command(config="full.yaml", output="whole")
    whole = checkpoint.load(Path("whole/checkpoints"), 6).weights
    for number in range(4):
        found = checkpoint.load(Path(f"broken-{number}/checkpoints"), 6).weights
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def edit_rows(begun: Path) -> None:
    rows = begun / "rows.csv"
    rows.write_text(rows.read_text().replace("yes 7", "no 7"))


def add_row(begun: Path) -> None:
    rows = begun / "rows.csv"
    rows.write_text(rows.read_text().replace("say 3,", "say it,no\nsay 3,"))


def remove_rows(begun: Path) -> None:
    rows = begun / "rows.csv"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:3] + lines[9:]))


def edit_tokenizer(begun: Path) -> None:
    path = begun / "base" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"model_max_length": 512', '"model_max_length": 500'))


def edit_template(begun: Path) -> None:
    path = begun / "config.yaml"
    path.write_text(path.read_text().replace("{question}", "Q {question}"))


def edit_rate(begun: Path) -> None:
    path = begun / "config.yaml"
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 3, "learning_rate": 0.5'))


def edit_base(begun: Path) -> None:
    path = begun / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("edit", "said"),
    [(edit_rows, "(the columns or the rows of the dataset)\n              1 row changed: 7\n"),
     (add_row, "20 rows → 21\n              1 row added: 3\n"), (remove_rows, "6 rows removed: 2, 3, 4, 5, 6 …\n"),
     (edit_tokenizer, "(the tokenizer)\n              tokenizer_config.json has changed\n"),
     (edit_template, r'config.prompt.template: "{question}\n" → "Q {question}\n"'),
     (edit_rate, "config.trainer.learning_rate: 0.0002 → 0.5"),
     (edit_base, "(the files of the base model)\n              model.safetensors has changed\n")],
)  # fmt: skip
@pytest.mark.parametrize("begun", ["decoder"], indirect=True)
def test_what_was_changed_under_a_run_is_refused_by_name(begun: Path, edit: Any, said: str) -> None:
    before = {path: path.read_bytes() for path in (begun / "made").rglob("*") if path.is_file()}
    edit(begun)
    with pytest.raises(RunError) as caught:
        train.command(config="config.yaml", output="made")
    assert caught.value.code == "run-other-lock" and said in str(caught.value) and "--fork" in str(caught.value)
    after = {path: path.read_bytes() for path in (begun / "made").rglob("*") if path.is_file()}
    assert before == after


def test_fork_starts_a_new_run_from_the_weights(begun: Path) -> None:
    train.command(config="config.yaml", output="other", fork="made", sets=["trainer.learning_rate=0.05"])
    record = json.loads(Path("other/run.json").read_text())
    assert record["state"] == "finished" and record["forked"]["step"] == 4
    assert record["lock"]["start_hash"] == manifest.hash_of(Path("made/checkpoints/step-000004/manifest.json"))
    assert RunFolder.load("made", trained=False).state == "failed"  # the run it came from is as it was

    def crash(event: Any) -> None:
        if isinstance(event, Stepped) and event.step == 1:
            raise Crash

    changed = config.load(Path("config.yaml"), ["trainer.learning_rate=0.05"])
    with pytest.raises(Crash):
        pipeline.train(changed, "rows.csv", output="again", fork="made/checkpoints/step-000004", sink=crash)
    start = checkpoint.load(Path("again/checkpoints"), 0)
    parent = checkpoint.load(Path("made/checkpoints"), 4)
    assert all(torch.equal(start.weights[name], parent.weights[name]) for name in parent.weights)
    shutil.rmtree("made/checkpoints")  # from here on it needs its parent no more
    train.command(resume="again")
    assert Path("again/adapter/manifest.json").read_bytes() == Path("other/adapter/manifest.json").read_bytes()


def test_a_fork_must_fit(begun: Path) -> None:
    with pytest.raises(RunError, match="does not fit the model"):
        train.command(config="config.yaml", output="other", fork="made", sets=["adapter={type: lora, r: 3}"])
    with pytest.raises(RunError, match="no such folder"):
        train.command(config="config.yaml", output="third", fork="nowhere")
    edit_base(begun)
    with pytest.raises(AssetError, match="another base"):
        train.command(config="config.yaml", output="fourth", fork="made")


def test_verify_names_what_changed(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.command(resume="made")
    runs.command([Path("verify"), Path("made")])
    assert capsys.readouterr().out.count(": whole") == len(checkpoint.steps_in(Path("made/checkpoints"))) + 1
    for victim in ("checkpoints/step-000006/optimizer.safetensors", "adapter/adapter_model.safetensors"):
        path = Path("made") / victim
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))
        with pytest.raises(typer.Exit) as caught:
            runs.command([Path("verify"), Path("made")])
        assert caught.value.exit_code == 5
        assert f"{path.parent.relative_to('made')}: {path.name} is not as manifest.json says" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        runs.command([Path("verify"), Path("made")], as_json=True)
    found = json.loads(capsys.readouterr().out)["made"]
    assert [one["what"] for one in found if one["faults"]] == ["checkpoints/step-000006", "adapter"]
