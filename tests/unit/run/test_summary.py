"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.errors import RunError
from luthier.run import summary


def test_features_are_compared_key_by_key(tmp_path: Path) -> None:
    def run(name: str, **feature: str) -> summary.RunSummary:
        config = {"input_features": [{"name": "a", "type": "text"}, {"name": "b", **feature}], "tags": [1, 2]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"lock": {"config": config}}), encoding="utf-8")
        return summary.read(tmp_path / name)

    runs = [run("one", type="text"), run("two", type="category")]
    assert summary.differences(runs) == {"input_features.[b].type": ['"text"', '"category"']}


def test_what_is_null_in_one_run_and_absent_in_another_makes_no_difference(tmp_path: Path) -> None:
    for name, config in (("one", {"prompt": {"task": None, "r": 1}}), ("two", {"prompt": {"r": None}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"lock": {"config": config}}), encoding="utf-8")
    assert summary.differences(summary.summarise([tmp_path])) == {"prompt.r": ["1", "null"]}


def test_a_run_that_was_killed_while_it_wrote_is_summarised(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    lines = [{"step": 1, "split": "train", "loss": 2.0}, {"step": 1, "split": "validation", "loss": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "split": "val'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    found = summary.read(tmp_path)
    assert (found.steps, found.validation_loss) == (1, 1.5)


def test_a_record_that_is_no_object_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        summary.read(tmp_path)
    assert caught.value.code == "run-not-a-run"


def test_what_two_runs_were_made_from_is_compared_too(tmp_path: Path) -> None:
    """Two runs of one config on different tables were told to be alike."""
    for name, data, version, rows in (("one", "a" * 64, "1", 10), ("two", "b" * 64, "2", 20)):
        (tmp_path / name).mkdir()
        lock = {"config": {"r": 1}, "data_hash": data, "base_hash": "c" * 64, "versions": {"torch": version, "x": "1"}}
        (tmp_path / name / "run.json").write_text(json.dumps({"lock": lock}), encoding="utf-8")
        record = {"dataset": f"/data/{name}.csv", "rows": rows}
        (tmp_path / name / "data.json").write_text(json.dumps(record), encoding="utf-8")
    runs = summary.summarise([tmp_path])
    assert summary.differences(runs) == {
        "data.hash": ["a" * 12, "b" * 12],
        "data.name": ["/data/one.csv", "/data/two.csv"],
        "data.rows": ["10", "20"],
        "versions.torch": ["1", "2"],
    }
    (tmp_path / "two" / "data.json").write_text("{", encoding="utf-8")  # what is broken hides no difference
    assert summary.differences(summary.summarise([tmp_path]))["data.hash"] == ["a" * 12, "b" * 12]
