"""Files that are either the old content or the new, never a half: write beside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one step. The folder must exist."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step. The folder must exist."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(0o666 & ~_umask())  # mkstemp makes 0600, which other users of a shared run could not read
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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

    Lexically: caches of models hold links on purpose.
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set("\\:\0") & set(name)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
