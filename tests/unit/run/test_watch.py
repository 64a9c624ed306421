"""The size of a folder in which others write and delete."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from luthier.events import Progress
from luthier.run.watch import growing


def test_folders_that_come_and_go_are_no_failure(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"x" * 1000)
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            inner = tmp_path / "away" / "far" / "away"
            inner.mkdir(parents=True)
            (inner / "file").write_bytes(b"y")
            shutil.rmtree(tmp_path / "away")

    other = threading.Thread(target=come_and_go)
    other.start()
    told: list[Progress] = []
    try:
        for _ in range(300):
            with growing(told.append, "save", tmp_path, 2000.0):
                pass
        with growing(told.append, "save", tmp_path, 2000.0, every=0.01):
            (tmp_path / "more").write_bytes(b"z" * 500)
            while len(told) < 303:
                pass
    finally:
        ended.set()
        other.join()
    assert told[-1].completed >= 0.00049 and told[-1].total == 0.002
