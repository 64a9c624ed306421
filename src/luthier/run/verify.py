"""Whether what a run has written is still as it was written: its checkpoints and its trained model, file by file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.run import manifest, sealed
from luthier.run.folder import RunFolder


@dataclass(frozen=True)
class Verdict:
    """A folder or file of a run. ``faults``: a line for each file that is not as it was; ``known``: it has a sum."""

    what: str
    faults: tuple[str, ...] = ()
    known: bool = True

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON types."""
        return asdict(self)


def verify(run: RunFolder) -> list[Verdict]:
    """Read every byte of what was begun with, of the checkpoints and of the trained model, and compare the sums."""
    folders = sorted(one for one in run.checkpoints.glob("*step-*") if one.is_dir() and not one.name.startswith("."))
    model = run.model_path
    whole = [_verdict(run.path, folder) for folder in [*folders, *([model] if model is not None else [])]]
    return [*([_alone(run.start)] if run.start.is_file() else []), *whole]


def _alone(path: Path) -> Verdict:
    try:
        why = sealed.fault(path)
    except OSError as error:
        why = f"{path.name} cannot be read: {error}"
    return Verdict(path.name, (why,) if why else ())


def _verdict(root: Path, folder: Path) -> Verdict:
    what = folder.relative_to(root).as_posix()
    if not (folder / manifest.NAME).is_file():
        whole = folder.parent == root  # a model of a version that wrote none; a checkpoint always has one
        return Verdict(what, () if whole else (f"{manifest.NAME} is missing",), known=False)
    try:
        return Verdict(what, tuple(manifest.faults(folder)))
    except (OSError, ValueError) as error:
        return Verdict(what, (f"{manifest.NAME} cannot be read: {error}",))
