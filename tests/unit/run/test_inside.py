"""Names that files give lead nowhere outside of their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from luthier.assets.spec import weight_files
from luthier.data import sources
from luthier.errors import AssetError, DataError
from luthier.run.atomic import is_inside

OUTSIDE = ("../x", "a/../../x", "/etc/passwd", "..", "", "..\\x", "C:\\x", "C:x", "a\0b", "./../../base-twin/x")


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside(name: str, tmp_path: Path) -> None:
    assert not is_inside(name)
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "x").write_bytes(b"a secret")
    (tmp_path / "base-twin").mkdir()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")
    with pytest.raises(AssetError, match="names no files of this folder"):
        weight_files(base)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}), encoding="utf-8")
    with pytest.raises(DataError, match="outside of itself"):
        sources.read(saved)
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": [name]}), encoding="utf-8")
    with pytest.raises(DataError, match="outside of itself"):
        sources.read(saved)


def test_inside(tmp_path: Path) -> None:
    assert all(map(is_inside, ("x", "a/b.safetensors", "...", "a..b", "日本")))
    rows = pa.table({"q": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as out, pa.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}), encoding="utf-8")
    assert len(sources.read(tmp_path)) == 2
