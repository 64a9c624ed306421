"""What was changed under a run: which rows of its data, which files of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.assets import file_hashes
from luthier.assets.tokenizer import FILES
from luthier.data import rowdiff
from luthier.pipeline.preparing import Work
from luthier.run.folder import read_record
from luthier.run.inputs import RECORD, ROWS


def inside(key: str, folder: Path, work: Work) -> Sequence[str]:
    """Lines on what differs between what a run recorded and the work now, for one hash of the lock."""
    record = folder / RECORD
    if not record.is_file():
        return ()
    known = read_record(record)
    if key == "data_hash":
        return _data(known, folder, work)
    if key in ("base_hash", "tokenizer_hash") and known.get("base_files"):
        before, now = known["base_files"], file_hashes(work.base.path)
        names = FILES if key == "tokenizer_hash" else sorted(before.keys() | now.keys())
        return _files({name: before.get(name) for name in names}, {name: now.get(name) for name in names})
    return ()


def _data(known: Mapping[str, Sequence[str]], folder: Path, work: Work) -> list[str]:
    lines, rows = rowdiff.columns(known.get("columns", ()), work.table.columns), folder / ROWS
    if rows.is_file() and not lines:  # with another column each row is another one
        lines += rowdiff.differences(rows.read_bytes(), work.table.row_hashes)
    return lines


def _files(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    words = {(True, True): "has changed", (True, False): "is gone", (False, True): "is new"}
    return [
        f"{name} {words[before[name] is not None, now[name] is not None]}"
        for name in before
        if before[name] != now[name]
    ]
