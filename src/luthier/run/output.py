"""A file that a command leaves where it is told to: tried before the work, and a refusal of the disk explained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier import json_reader
from luthier.errors import RunError
from luthier.run import atomic

IsOurs = Callable[[Path], bool]  # whether an earlier call of the same command wrote the file


def require_ours(file: Path, is_ours: IsOurs) -> None:
    """Raise RunError run-foreign-files for a file that holds something else: it would be lost."""
    if not file.is_file() or file.stat().st_size == 0 or is_ours(file):
        return
    raise RunError(
        "run-foreign-files",
        f"{file.name} is there and holds something else, which would be lost",
        where=str(file),
        received="a file that this command did not write",
        allowed="a new file, or one that an earlier call wrote",
        fix="name another file with --output, or move this one away",
    )


def json_with(*names: str) -> IsOurs:
    """Whether a file holds a JSON object with these names."""

    def is_ours(file: Path) -> bool:
        try:
            value = json_reader.read(file)
        except ValueError:
            return False
        return isinstance(value, dict) and value.keys() >= set(names)

    return is_ours


@contextmanager
def writing(file: Path, is_ours: IsOurs) -> Iterator[None]:
    """A body that writes ``file``, in a folder that is made where there is none and has been tried.

    Raises RunError run-foreign-files, run-not-writable or run-no-space, before the body or for a write in it that the
    disk refuses.
    """
    require_ours(file, is_ours)
    folder = file.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise refused(file, error) from error
    try:
        yield
    except OSError as error:
        named = error.filename
        if atomic.is_full(error) or (isinstance(named, str) and Path(named).absolute().is_relative_to(folder)):
            raise refused(file, error) from error
        raise


def refused(file: Path, error: OSError) -> RunError:
    """What is said when the disk does not take an output file."""
    said = error.strerror or str(error)
    if atomic.is_full(error):
        return RunError(
            "run-no-space",
            f"{file.name} cannot be written: {said}",
            where=str(file),
            received="a full disk",
            fix="free some space, or choose an --output on another disk",
        )
    return RunError(
        "run-not-writable",
        f"{file.name} cannot be written: {said}",
        where=str(file),
        received=said,
        fix="choose an --output in a folder that you may write to",
    )
