"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

from luthier.run import summary


def test_features_are_compared_key_by_key(tmp_path: Path) -> None:
    def run(name: str, **feature: str) -> summary.RunSummary:
        config = {"input_features": [{"name": "a", "type": "text"}, {"name": "b", **feature}], "tags": [1, 2]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"lock": {"config": config}}), encoding="utf-8")
        return summary.read(tmp_path / name)

    runs = [run("one", type="text"), run("two", type="category")]
    assert summary.differences(runs) == {"input_features.[b].type": ['"text"', '"category"']}
