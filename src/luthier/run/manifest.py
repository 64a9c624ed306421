"""The manifest of a folder: size and sha256 of each file in it, so that a single flipped bit is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from luthier import json_reader

NAME = "manifest.json"
FORMAT = 1


def write(folder: Path) -> None:
    """Write the manifest of the files that are in ``folder`` now; its README.md may change later."""
    files = {one.name: {"sha256": hash_of(one), "bytes": one.stat().st_size} for one in _files(folder)}
    text = json.dumps({"format": FORMAT, "files": files}, indent=2)
    (folder / NAME).write_text(text, encoding="utf-8")


def faults(folder: Path, *, sum_of: Callable[[Path], str] | None = None, each: Callable[..., Any] = map) -> list[str]:
    """One line for each file that is not as the manifest says; empty: all of them are. Files beyond it do not count.

    ``sum_of`` takes the place of hashing here, ``each`` that of doing so file by file.
    Raises ValueError when there is no manifest that can be read, OSError when a file cannot be.
    """
    said = _said(folder)
    found = each(partial(_fault, folder, sum_of or hash_of), said.keys(), said.values())
    return [line for line in found if line]


def unlisted(folder: Path) -> list[str]:
    """The names of files in ``folder`` that its manifest does not have. Raises ValueError as `faults`."""
    known = _said(folder)
    return [one.name for one in _files(folder) if one.name not in known]


def is_there(folder: Path) -> bool:
    """Whether ``folder`` has a manifest of ours; a file of that name may be another program's."""
    try:
        return bool(_said(folder))
    except ValueError:
        return False


def _said(folder: Path) -> dict[str, Any]:
    try:
        said = json_reader.read(folder / NAME)
    except ValueError as error:
        raise ValueError(f"{NAME} cannot be read: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("files"), dict) or said.get("format") != FORMAT:
        raise ValueError(f"{NAME} is not a manifest")
    files: dict[str, Any] = said["files"]
    return files


def hash_of(path: Path) -> str:
    """The sha256 of a file in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """All but the manifest itself and the card, which people edit."""
    return sorted(one for one in folder.iterdir() if one.is_file() and one.name not in (NAME, "README.md"))


def _fault(folder: Path, sum_of: Callable[[Path], str], name: str, known: object) -> str | None:
    if Path(name).name != name or not isinstance(known, dict):
        return f"{NAME} names {name!r}, which is no file beside it"
    path = folder / name
    if not path.is_file():
        return f"{name} is missing, which {NAME} names"
    if path.stat().st_size != known.get("bytes"):
        return f"{name} has {path.stat().st_size} bytes, not the {known.get('bytes')} that {NAME} says"
    return None if sum_of(path) == known.get("sha256") else f"{name} is not as {NAME} says: one of them has changed"
