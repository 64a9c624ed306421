from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from luthier.assets.cache import build_once, code_hash, forget_old, read_made, remembered_hash, writable_cache
from luthier.errors import RunError


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    def make(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError) as caught:
        build_once(tmp_path / "made", make)
    assert caught.value.code == "run-no-space" and "LUTHIER_CACHE" in str(caught.value)
    assert "GiB free" in str(caught.value.faults[0].received) and "converted model" in str(
        caught.value.faults[0].allowed
    )
    assert [p.name for p in tmp_path.iterdir()] == []


def test_only_what_was_not_used_for_long_is_forgotten(tmp_path: Path) -> None:
    for name, age in (("now", 0), ("recent", 10), ("old", 40)):
        (tmp_path / name).mkdir()
        when = (tmp_path / name).stat().st_mtime - age * 86400
        os.utime(tmp_path / name, (when, when))
    forget_old(tmp_path / "now")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["now", "recent"]


def test_other_code_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = code_hash(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert code_hash(tmp_path) != before


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "not" / "yet"))
    assert writable_cache() == tmp_path / "not" / "yet"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert writable_cache() is None


@pytest.mark.parametrize("said", [b"[]", b"{", b"[" * 5000, b"\xff"])
def test_a_damaged_record_costs_one_hashing(said: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("content")
    first = remembered_hash(path, tmp_path)
    (record,) = (tmp_path / "hashes").iterdir()
    whole = record.read_bytes()
    record.write_bytes(said)
    assert remembered_hash(path, tmp_path) == first and record.read_bytes() == whole


@pytest.mark.parametrize("said", [b"{", b"[" * 5000, b"\xff"])
def test_a_damaged_file_of_the_cache_is_named_with_the_folder_to_delete(said: bytes, tmp_path: Path) -> None:
    folder = build_once(tmp_path / "made", lambda staging: (staging / "a.json").write_bytes(said))
    with pytest.raises(RunError) as caught:
        read_made(folder / "a.json")
    assert caught.value.code == "run-damaged" and f"delete {folder}," in str(caught.value)
