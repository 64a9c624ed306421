import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import RunError
from luthier.events import Note, Stepped
from luthier.run import (
    Lock,
    MetricsWriter,
    RunFolder,
    atomic,
    diff,
    drift,
    hash_config,
    list_runs,
    manifest,
    numbered,
    read_metrics,
    summary,
)
from luthier.run import require_space as require
from luthier.run.folder import sized


def lock(**changes) -> Lock:
    config = changes.pop("config", {"trainer": {"epochs": 3}, "name": "a"})
    base = {
        "config_hash": hash_config(config), "config": config, "data_hash": "d", "base_hash": "b", "base_name": "tiny",
        "tokenizer_hash": "t", "template_hash": "p", "seed": 1, "versions": {"torch": "2.13"},
    }  # fmt: skip
    return Lock(**{**base, **changes})


def test_what_was_made_for_a_run_that_never_began_can_be_taken_away(tmp_path: Path) -> None:
    """With the folders above it, and never what was there before, another's, or a run's."""
    assert RunFolder.open(tmp_path / "a" / "b").discard() and not (tmp_path / "a").exists()
    assert RunFolder.open(None, root=tmp_path / "runs").discard() and not (tmp_path / "runs").exists()
    one, two = RunFolder.open(None, root=tmp_path / "runs"), RunFolder.open(None, root=tmp_path / "runs")
    assert one.discard() and not one.path.exists() and two.path.is_dir()
    two.complete_lock(lock())
    assert not two.discard() and two.path.is_dir()
    two.close()
    again = RunFolder.open(two.path)
    assert not again.discard() and two.path.is_dir()
    again.close()
    (tmp_path / "mine").mkdir()
    mine = RunFolder.open(tmp_path / "mine")
    assert not mine.discard()
    mine.close()


def test_a_new_run_has_its_record_first_and_goes_through_its_states(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "out", name="demo")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "preparing"
    assert run.lock is None
    assert run.complete_lock(lock()) == "new"
    assert run.state == "training"
    assert run.lock == lock()
    run.close()

    again = RunFolder.open(tmp_path / "out")
    assert again.complete_lock(lock(versions={"torch": "2.12"})) == "resume"  # versions lower the promise, no more
    again.finish(best_step=3)
    third = RunFolder.open(tmp_path / "out")
    assert third.complete_lock(lock()) == "finished"
    assert third.record["best_step"] == 3


def test_another_lock_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "out")
    run.complete_lock(lock())
    before = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(RunError) as caught:
        run.complete_lock(lock(config={"trainer": {"epochs": 4}}))
    assert caught.value.code == "run-other-lock"
    assert "config.trainer.epochs: 3 → 4" in str(caught.value)
    assert (tmp_path / "out" / "run.json").read_text() == before


def test_lock_differences() -> None:
    assert diff(lock(), lock(config={"trainer": {"epochs": 3}, "name": "other"})) == []
    assert diff(lock(), lock(data_hash="e")) == ["data_hash: d → e (the columns or the rows of the dataset)"]
    assert drift(lock(), lock(versions={"torch": "2.12"})) == ['versions.torch: "2.13" → "2.12"']
    assert hash_config({"a": 1, "b": 2}) == hash_config({"b": 2, "a": 1}) != hash_config({"a": 1, "b": 3})


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError) as caught:
        RunFolder.open(tmp_path)
    assert caught.value.code == "run-foreign-files"
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="not a folder"):
        RunFolder.open(tmp_path / "thesis.txt")


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "out")
    code = f"from luthier.run import RunFolder; RunFolder.open({str(tmp_path / 'out')!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "run-in-use" in other.stderr
    run.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_default_names_are_fresh_and_numbers_follow(tmp_path: Path) -> None:
    first, second = (RunFolder.open(None, name="my data.csv", root=tmp_path / "runs") for _ in range(2))
    assert first.path != second.path
    assert "my-data.csv" in first.path.name
    assert [run.path for run in list_runs(tmp_path / "runs")] == [first.path, second.path]
    assert list_runs(tmp_path / "nowhere") == []
    assert [numbered(tmp_path / "results").name for _ in range(2)] == ["run-0", "run-1"]


def test_loading_needs_a_trained_model(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RunError) as caught:
            RunFolder.load(path)
        assert caught.value.code == "run-not-a-run"
    run = RunFolder.open(tmp_path / "out")
    with pytest.raises(RunError, match="no trained model"):
        RunFolder.load(run.path)
    run.adapter.mkdir()
    assert RunFolder.load(run.path).model_path == run.adapter
    assert RunFolder.load(run.path / "model").path == run.path  # Ludwig's spelling


def test_damaged_and_newer_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError) as caught:
        RunFolder.load(tmp_path)
    assert caught.value.code == "run-damaged"
    (tmp_path / "run.json").write_text('{"format": 99, "state": "finished"}')
    with pytest.raises(RunError, match="newer"):
        RunFolder.load(tmp_path)


def test_records_that_nest_too_deep_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    for read in (lambda: RunFolder.load(tmp_path), lambda: summary.read(tmp_path)):
        with pytest.raises(RunError):
            read()
    (tmp_path / manifest.NAME).write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        manifest.faults(tmp_path)


def test_no_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    require(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError) as caught:
        require(tmp_path, 2**62)
    assert caught.value.code == "run-no-space"


def test_small_sizes_are_told_too() -> None:
    assert [sized(n) for n in (3 * 2**30, 2**30 / 5, 2**20, 2**17)] == ["3.00 GiB", "0.20 GiB", "1.0 MiB", "0.1 MiB"]


def stepped(step: int, **values) -> Stepped:
    return Stepped(step=step, total_steps=9, epoch=step / 3, split="train", loss=1.5, values=values)


def test_metrics_are_lines_and_a_resume_rewinds_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer(Note(text="no line"))
    for step in (1, 2, 3):
        writer(stepped(step, learning_rate=0.1, perplexity=float("inf")))
    with path.open("a") as out:
        out.write('{"step": 4, "torn')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[0]["perplexity"] is None
    assert {"time", "step", "epoch", "split", "loss", "learning_rate"} <= read_metrics(path)[0].keys()
    resumed = MetricsWriter(path)
    resumed(stepped(3))
    resumed(stepped(4))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    resumed.rewind(2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"\xff", b'{"a":' * 5000, b"\0\0"])
def test_a_damaged_line_of_the_metrics_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path)(stepped(1))
    whole = path.read_bytes()
    path.write_bytes(whole + line)  # torn, even in the middle of a letter
    assert [one["step"] for one in read_metrics(path)] == [1]
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(RunError) as caught:
        read_metrics(path)
    assert caught.value.code == "run-damaged" and caught.value.faults[0].where == f"{path}:2"


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"v": 1})
    with pytest.raises(ValueError):
        atomic.write_json(path, {"v": float("nan")})
    assert json.loads(path.read_text()) == {"v": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_run_is_free_of_torch() -> None:
    code = "import sys, luthier.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
