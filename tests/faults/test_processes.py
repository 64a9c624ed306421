"""A few of each fault on real `luthier train` processes; `make test-faults` runs hundreds and prints the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVE = Path(__file__).with_name("drive.py")


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
