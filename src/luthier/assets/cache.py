"""Where derived files are kept, how they are hashed, and how two processes make each of them only once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.errors import RunError
from luthier.run.atomic import write_json
from luthier.run.folder import read_record, sized
from luthier.run.oslock import hold

PIECE = 16 * 2**20  # bytes hashed at a time
WAIT = 900.0  # seconds to wait for another process that is making the same thing


def cache_root(cache: Path | None = None) -> Path:
    """``cache``, else LUTHIER_CACHE, else the platform's cache folder. Not created here."""
    if cache is not None:
        return cache
    if named := os.environ.get("LUTHIER_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "luthier"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/luthier").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "luthier"


def writable_cache() -> Path | None:
    """`cache_root`, where this process may write there; None in a read-only home or container."""
    root = near = cache_root()
    while not near.exists() and near != near.parent:
        near = near.parent
    return root if near.is_dir() and os.access(near, os.W_OK) else None


def file_hash(path: Path) -> str:
    """Sha256 of a file, in hexadecimal.

    In large pieces: each lets go of the interpreter once, so that other threads (files, imports) run beside it.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def remembered_hash(path: Path, root: Path) -> str:
    """Sha256 of a large file, computed again only when its size or time of change differ."""
    real = path.resolve()
    stat = real.stat()
    stamp = {"path": str(real), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    record = root / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    if record.is_file():
        try:
            known = json_reader.read(record)
            if known["stamp"] == stamp:
                return str(known["sha256"])
        except (ValueError, KeyError, TypeError):
            pass  # a damaged record costs one hashing, nothing else
    digest = file_hash(real)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"stamp": stamp, "sha256": digest})
    return digest


def build_once(folder: Path, make: Callable[[Path], None], wait: float = WAIT) -> Path:
    """``folder``, made by ``make`` in a folder beside it and renamed when complete; concurrent callers wait.

    Raises TimeoutError when another process holds the lock for longer than ``wait`` seconds, RunError ``run-no-space``
    when the disk is full. What fails leaves nothing behind.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    handle = _held(lock, folder, wait)
    try:
        if folder.is_dir():  # another process was faster
            return folder
        staging = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed; we hold the lock
        staging.mkdir()
        try:
            make(staging)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(folder) from error
            raise
        staging.rename(folder)
        return folder
    finally:
        with suppress(OSError):  # where files that are open cannot go, it stays
            lock.unlink()
        os.close(handle)  # the operating system lets the lock go with the handle, also when a process dies


def read_made(path: Path) -> Any:
    """What a JSON file of a folder that `build_once` made holds. Raises RunError ``run-damaged``."""
    return read_record(path, fix=_again(path.parent))


def damaged(folder: Path, error: Exception) -> RunError:
    """What is said of a folder that `build_once` made and that cannot be read any more."""
    message, allowed = f"a file of the cache is damaged: {error}", "whole files, as Luthier wrote them"
    return RunError("run-damaged", message, where=str(folder), received=str(error), allowed=allowed, fix=_again(folder))


def _again(folder: Path) -> str:
    return f"delete {folder}, which is then made again"


def forget_old(folder: Path, days: int = 30) -> None:
    """Delete what stands beside ``folder`` and was not used for ``days``; ``folder`` itself counts as used now."""
    os.utime(folder)
    oldest = time.time() - days * 86400
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder and other.stat().st_mtime < oldest:
            shutil.rmtree(other, ignore_errors=True)


def code_hash(*paths: Path) -> str:
    """Sha256 over the Python sources at ``paths``: what was derived by other code is not taken for this code's."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _full(folder: Path) -> RunError:
    return RunError(
        "run-no-space",
        "the disk of the cache is full",
        where=str(folder.parent),
        received=f"{sized(shutil.disk_usage(folder.parent).free)} free",
        allowed="room for the converted model and the prepared rows",
        fix="free some space, or set LUTHIER_CACHE to a folder on another disk",
    )


def _held(lock: Path, folder: Path, wait: float) -> int:
    """The handle of the lock file, locked. Raises TimeoutError as `build_once` does."""
    deadline = time.monotonic() + wait
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        while not hold(handle):
            if time.monotonic() > deadline:
                os.close(handle)
                raise TimeoutError(f"another process has been making {folder} for more than {wait:.0f} s")
            time.sleep(0.2)
        with suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(handle)):
                return handle
        os.close(handle)  # the process before us has removed it; a newer one may be there
