"""What the benchmarks write down beside their numbers; none of them runs here."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_percentiles_are_of_the_steps(load: Any) -> None:
    module = load("provenance")
    assert module.percentiles([5.04]) == {"ms_p50": 5.0, "ms_p90": 5.0}
    assert module.percentiles([9.0, 1.0, 2.0, 4.0]) == {"ms_p50": 3.0, "ms_p90": 9.0}
    assert module.percentiles(range(100)) == {"ms_p50": 49.5, "ms_p90": 90}


def test_a_result_tells_its_commit_and_whether_the_tree_was_that(load: Any, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = load("provenance")
    git("init", "-q")
    file = tmp_path / "file"
    file.write_text("one")
    git("add", "file")
    git("commit", "-qm", "one", "--no-verify")
    git("tag", "-am", "a tag is not the commit", "v1")
    short = git("rev-parse", "--short", "HEAD")
    assert module.commit(tmp_path) == short
    file.write_text("two")
    assert module.commit(tmp_path) == f"{short}-dirty"
    (tmp_path / "unpacked").mkdir()
    assert module.commit(tmp_path / "unpacked") == ""  # no checkout itself, though it lies in one
    told = module.provenance("torch", "no-such-package")
    assert set(told) == {"commit", "versions"}
    assert told["versions"].endswith(f" torch {importlib.metadata.version('torch')} no-such-package absent")


def test_a_peers_row_has_the_spread_of_its_timed_steps(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers")
    clock = peers.Clock(cpu=True, warm=1, last=4)
    times = iter([10.0, 10.0, 10.1, 10.3, 10.9, 10.9])
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(times))
    for _ in range(6):  # a trainer may go on after the last
        clock.given(torch.tensor([[0, peers.REAL, 77]]))
        clock.stepped()
    row = clock.row("plain", "literal")
    assert (row["ms_p50"], row["ms_p90"], row["ms_per_step"]) == (200.0, 600.0, 300.0)
    assert row["tokens_per_s"] == round(2 * 3 / 0.9)
    assert set(row) | {"commit", "versions", "error"} == set(peers.COLUMNS)


def test_on_a_gpu_no_step_between_the_first_and_the_last_waits(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self) -> None:
            self.at = 7.0 * len(made) ** 2

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    clock = load("peers").Clock(cpu=False, warm=2, last=5)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock.step))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    for _ in range(5):
        clock.stepped()
    assert waits == [2, 5]
    row = clock.row("plain", "padded")
    assert (row["ms_p50"], row["ms_p90"]) == (35.0, 49.0)


def test_a_peer_that_is_not_installed_says_so(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peers = load("peers")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for who in ("ludwig", "trl", "unsloth"):
        monkeypatch.setitem(sys.modules, who, None)
        peers.one(who, peers.Job(tmp_path, tmp_path, steps=1, cpu=False), None)
        (line,) = capsys.readouterr().out.splitlines()
        row = json.loads(line.removeprefix("ROW "))
        assert row["who"] == who and row["error"].startswith("not installed:") and who in row["error"]


def test_a_tokenizer_lies_beside_a_base_that_has_none(load: Any, tmp_path: Path) -> None:
    peers = load("peers")
    base, other = tmp_path / "base", tmp_path / "tokenizer"
    for folder, names in ((base, ("config.json", "model.safetensors")), (other, ("config.json", "tokenizer.json"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    job = peers.Job(base, base, steps=1, cpu=True)
    assert peers.with_tokenizer(job) == base
    both = peers.with_tokenizer(peers.Job(base, other, steps=1, cpu=True))
    read = {path.name: path.read_text() for path in both.iterdir()}
    assert read == {"config.json": "base", "model.safetensors": "base", "tokenizer.json": "tokenizer"}


def test_earlier_tables_are_drawn_too(load: Any) -> None:
    picture, columns = load("picture"), load("peers").COLUMNS
    with (FOLDER / "results" / "peers_h200.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert not set(rows[0]) - set(columns)
    drawn = picture.draw(rows, "title")
    later = picture.draw([dict.fromkeys(columns, "") | row for row in rows], "title")
    assert drawn == later and drawn.count("<rect") == 1 + sum(bool(row["tokens_per_s"]) for row in rows)


def test_an_epoch_on_a_cpu_tells_each_step(load: Any) -> None:
    steps = load("cpu_speed").epoch(lambda _: None, lambda step: [step], lambda: None)
    assert len(steps) == 4 and all(seconds > 0 for seconds in steps)


def test_the_whole_job_tells_its_commit_and_versions(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load("seed_job")
    monkeypatch.setattr(module, "run", lambda *_: {"exit": 0})
    monkeypatch.setattr(sys, "argv", ["seed_job.py", str(tmp_path), "--out", str(tmp_path / "out.json")])
    module.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"commit", "versions", "fresh", "empty", "unread"}
    assert f"torch {importlib.metadata.version('torch')}" in found["versions"]
