"""A few changed files for every parser; `make test-faults` tries 5,000 of most."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
sys.path.insert(0, str(FUZZ.parent))

from parsers import TARGETS  # noqa: E402


@pytest.mark.alone
def test_parsers_read_or_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, str(FUZZ), "--count", "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 faults") == len(TARGETS)
