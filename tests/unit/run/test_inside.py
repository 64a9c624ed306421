"""Names that files give lead nowhere outside of their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from luthier import assets
from luthier.assets.spec import weight_files
from luthier.data import sources
from luthier.errors import AssetError, DataError, RunError
from luthier.export.hub import upload
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


def test_links_of_a_base_may_not_lead_out_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Files beside the weights are copied with what is made; a hub cache links to its own; weights are weights."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base-twin").mkdir()
    for place in ("secret", "base-twin/secret"):
        (tmp_path / place).write_text("a private key", encoding="utf-8")
        (base / "token.txt").symlink_to(tmp_path / place)
        with pytest.raises(AssetError, match=r"links to files outside.*(\n.*)*token.txt"):
            assets.resolve(str(base), cache=tmp_path / "cache")
        (base / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(AssetError, match="links to files outside"):
            assets.convert_pickled(base)
        (base / "pytorch_model.bin").unlink()
        (base / "token.txt").unlink()
    (base / "token.txt").symlink_to(base / "config.json")
    weights = shutil.move(base / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(weights)
    assert assets.resolve(str(base), cache=tmp_path / "cache").path == base
    (tmp_path / "link").symlink_to(base)
    assert assets.resolve(str(tmp_path / "link"), cache=tmp_path / "cache").path == tmp_path / "link"
    cached = tmp_path / "hub" / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    for one in tiny_llama.iterdir():
        shutil.copy(one, cached / "blobs" / one.name)
        (snapshot / one.name).symlink_to(Path("../../blobs") / one.name)
    assert assets.resolve(str(snapshot), cache=tmp_path / "cache").path == snapshot
    (snapshot / "token.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(AssetError, match="links to files outside"):
        assets.resolve(str(snapshot), cache=tmp_path / "cache")


def test_links_of_a_saved_dataset_and_of_what_is_uploaded(tmp_path: Path) -> None:
    rows = pa.table({"q": ["a secret", "b"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pa.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}), encoding="utf-8")
    (saved / "x.arrow").symlink_to(tmp_path / "x.arrow")
    with pytest.raises(DataError, match="outside of itself"):
        sources.read(saved)
    model = tmp_path / "adapter"
    model.mkdir()
    (model / "adapter_model.safetensors").write_bytes(b"x")
    (model / "notes.txt").symlink_to(tmp_path / "x.arrow")
    with pytest.raises(RunError, match="which an upload would publish"):
        upload(model, "a/b")
