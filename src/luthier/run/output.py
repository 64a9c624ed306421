"""A file that a command leaves where it is told to: tried before the work, and a refusal of the disk explained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import RunError
from luthier.run import atomic


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """A body that writes ``file``, in a folder that is made where there is none and has been tried.

    Raises RunError run-not-writable or run-no-space, before the body or for a write in it that the disk refuses.
    """
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
