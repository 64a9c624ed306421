"""Where the base model is that a config names: beside the config, as its table is, or where a run has recorded it."""

from __future__ import annotations

from pathlib import Path

from luthier import assets
from luthier.config import Config
from luthier.run import RunFolder
from luthier.run.inputs import RECORD


def base_name(settings: Config) -> str:
    """The name to resolve. Raises AssetError asset-not-found for one that stands for nothing; nothing is fetched.

    A relative path means what lies beside the config, or else in the working directory. The config.yaml of a run folder
    is a copy, beside which no base stands: the run's record says where it was.
    """
    declared, file = settings.base_model, settings.file
    if file is not None and (file.parent / "run.json").is_file() and (file.parent / RECORD).is_file():
        return _recorded(declared, RunFolder.load(file.parent, trained=False))
    if file is None or declared in assets.ALIASES:
        assets.refuse_no_name(declared)
        return declared
    here = Path(declared).expanduser()
    beside = file.parent / here
    if beside.exists() and not (here.exists() and here.samefile(beside)):
        return str(beside)
    assets.refuse_no_name(declared, beside=file.parent)
    return declared


def _recorded(declared: str, run: RunFolder) -> str:
    recorded = run.read_json(RECORD).get("base")
    overridden = run.lock is not None and run.lock.config.get("base_model") != declared
    if recorded is not None and not overridden:
        if Path(recorded).exists():
            return str(recorded)
        if not Path(declared).expanduser().exists():
            raise assets.not_found(declared, [f"{recorded}, where the run has read it"], "put it back where it was")
    assets.refuse_no_name(declared)
    return declared
