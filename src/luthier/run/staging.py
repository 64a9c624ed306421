"""Folders that appear whole or not at all: made beside their place, brought to the disk, renamed once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.run import atomic
from luthier.run.oslock import FolderLock


def staging_of(folder: Path) -> Path:
    """Where ``folder`` is made; always the same place, so that what a killed process left is found again."""
    return folder.with_name(f".{folder.name}.staging")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the body ends well, and goes away otherwise.

    What stands at ``folder`` until then stays whole. What a process that was killed had begun is removed.

    Raises RunError run-in-use when another process is making the same folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = staging_of(folder)
    place.mkdir(exist_ok=True)
    held = FolderLock(place)
    new, before = place / "new", place / "before"
    try:
        for left in (new, before):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir()
        yield new
        for one in new.rglob("*"):
            if one.is_file():
                atomic.sync_file(one)
        atomic.sync_folder(new)
        if folder.exists():
            folder.rename(before)
        new.rename(folder)
        atomic.sync_folder(folder.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        held.release()
