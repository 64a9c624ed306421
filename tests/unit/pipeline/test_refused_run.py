"""A run that is refused before it begins leaves nothing behind; one that has begun keeps its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import TrainingError
from luthier.run import RunFolder


def test_a_run_that_cannot_fit_leaves_no_folder(
    settings: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    limited = luthier.Model(settings | {"execution": {"memory_limit": "1MiB"}}, quiet=True)
    with pytest.raises(TrainingError, match="does not fit"):
        limited.train(rows, output=tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(TrainingError, match="does not fit"):
        limited.train(rows, output=own)
    assert RunFolder.load(own, trained=False).state == "failed"  # this one was there before
