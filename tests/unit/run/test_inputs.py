"""Which table a config means: beside it, in the working directory, or where the run's record says it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.run import Inputs, recorded_inputs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The config.yaml of a run folder whose table stands elsewhere."""
    table = tmp_path / "data" / "rows.csv"
    table.parent.mkdir()
    table.write_text("a,b\n1,2\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "data.json").write_text(json.dumps({"dataset": str(table), "encoding": "cp932"}))
    return folder / "config.yaml"


def test_the_record_of_a_run_is_read(run: Path) -> None:
    table = str(run.parent.parent / "data" / "rows.csv")
    assert recorded_inputs("rows.csv", run) == recorded_inputs(None, run) == Inputs(table, "cp932")


def test_a_file_beside_the_config_comes_first(run: Path) -> None:
    (run.parent / "rows.csv").write_text("c\n")
    assert recorded_inputs("rows.csv", run) == Inputs(str(run.parent / "rows.csv"))


def test_without_a_record_the_name_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    assert recorded_inputs("owner/name", tmp_path / "config.yaml") == Inputs("owner/name")
    assert recorded_inputs("rows.csv", None) == Inputs("rows.csv")
    Path(json.loads((run.parent / "data.json").read_text())["dataset"]).unlink()
    assert recorded_inputs("rows.csv", run) == Inputs("rows.csv")
