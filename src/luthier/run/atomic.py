"""Files that are either the old content or the new, never a half: write beside, fsync, rename.

What a process that was killed had begun beside is removed by the next write into the same folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from luthier.run import oslock

BEGUN = ".begun"  # the ending of a file that is being written


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one step. The folder must exist."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step. The folder must exist."""
    sweep(path.parent)
    handle, name = _begin(path)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
            if os.name != "nt":
                _take_place(name, path)
        if os.name == "nt":
            _take_place(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _take_place(name: str, path: Path) -> None:
    Path(name).chmod(0o666 & ~_umask())  # mkstemp makes 0600, which other users of a shared run could not read
    Path(name).replace(path)


def sweep(folder: Path) -> None:
    """Remove the files that processes had begun here and did not end, because they were killed."""
    if os.name == "nt":  # where a file cannot take its place while it is open, so that a lock would not tell
        return
    for left in folder.glob(f".*{BEGUN}"):
        with suppress(OSError):  # it has taken its place meanwhile
            handle = os.open(left, os.O_RDWR)
            try:
                if oslock.hold(handle):  # whoever had begun it is dead
                    left.unlink()
            finally:
                os.close(handle)


def _begin(path: Path) -> tuple[int, str]:
    """A new file beside ``path``; locked while it is open, so that `sweep` lets it stand."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=BEGUN, dir=path.parent)
        oslock.hold(handle, wait=True)  # without locks here, nobody can sweep either
        if os.fstat(handle).st_nlink or os.name == "nt":
            return handle, name
        os.close(handle)  # a sweep had it before us


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON. Raises ValueError on NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: the disk, a quota, or a limit on the size of files."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"os error (\d+)", str(error))):  # as safetensors says it
        number = int(said[1])
    return number in FULL


def sync_file(path: Path) -> None:
    """Have a file that another library wrote reach the disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Have the names in a folder reach the disk; Windows has no such thing and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_inside(name: str) -> bool:
    """Whether a name that a file gives leads to something below the file's own folder, on every system.

    Lexically; where links may lead is said by `leads_out`.
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set("\\:\0") & set(name)


def leads_out(path: Path, roots: Iterable[Path]) -> bool:
    """Whether ``path`` is, through links, a file outside of all ``roots`` (real paths); one that is absent is not."""
    return path.exists() and not any(path.resolve().is_relative_to(root) for root in roots)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
