"""Whether what a run has written is still as it was written: its checkpoints and its trained model, file by file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.run import manifest, sealed
from luthier.run.folder import RunFolder

MERGED = "merged"  # the folder of the merged weights in a run
RECORDED = "model_sha256"  # in run.json: of the manifest of the trained model


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
    """Read every byte of what was begun with, of the checkpoints and of the trained model, merged or not."""
    folders = sorted(one for one in run.checkpoints.glob("*step-*") if one.is_dir() and not one.name.startswith("."))
    model = run.model_path
    made = [one for one in (model, run.path / MERGED) if one is not None and one.is_dir()]
    whole = [_verdict(run, folder) for folder in [*folders, *made]]
    return [*([_alone(run.start)] if run.start.is_file() else []), *whole]


def sums_of(run: RunFolder) -> dict[str, str]:
    """What run.json shall hold of a model that has been trained, so that no other is taken for it."""
    assert run.model_path is not None, "training has saved what it trained"
    return {RECORDED: manifest.hash_of(run.model_path / manifest.NAME)}


def has_sums(run: RunFolder) -> bool:
    """Whether there is anything to compare the trained model with; a run of an early version has nothing."""
    return RECORDED in run.record or run.model_path is None or (run.model_path / manifest.NAME).is_file()


def faults_of(folder: Path, known: str | None = None, **how: Any) -> list[str]:
    """One line for each file of a folder that is not as its manifest says, or is not of it though it holds weights.

    ``known``: the sha256 of the manifest itself, where that is recorded; ``how``: as `manifest.faults`.
    """
    name = folder / manifest.NAME
    try:
        if not name.is_file():
            return [f"{manifest.NAME} is missing"]
        if known is not None and manifest.hash_of(name) != known:
            return [f"{manifest.NAME} is not that of this run: another model lies here, or it was edited"]
        added = [f"{one} is new" for one in manifest.unlisted(folder) if one.endswith(".safetensors")]
        return manifest.faults(folder, **how) + added
    except (OSError, ValueError) as error:
        return [f"{manifest.NAME} cannot be read: {error}"]


def _alone(path: Path) -> Verdict:
    try:
        why = sealed.fault(path)
    except OSError as error:
        why = f"{path.name} cannot be read: {error}"
    return Verdict(path.name, (why,) if why else ())


def _verdict(run: RunFolder, folder: Path) -> Verdict:
    what, model = folder.relative_to(run.path).as_posix(), folder == run.model_path
    if (model and not has_sums(run)) or (folder.name == MERGED and not (folder / manifest.NAME).is_file()):
        return Verdict(what, known=False)
    faults = faults_of(folder, run.record.get(RECORDED) if model else None)
    return Verdict(what, tuple(faults), (folder / manifest.NAME).is_file())
