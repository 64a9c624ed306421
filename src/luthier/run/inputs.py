"""Which dataset a config means: the file beside it, or the one that a run recorded when it began."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.run.folder import read_record

RECORD = "data.json"  # in a run folder: what was read, and how
ROWS = "rows.hash"  # beside it: a few bytes of each row, which tell later on which of them were changed


@dataclass(frozen=True, slots=True)
class Inputs:
    """A dataset as it was named, and its text encoding where that had to be said."""

    dataset: str | None
    encoding: str | None = None


def recorded_inputs(declared: str | None, config_path: str | Path | None) -> Inputs:
    """What the config file ``config_path`` reads, whose key ``dataset`` is ``declared``.

    A relative name means the file beside the config, or else one in the working directory. The config.yaml of a run
    folder is a copy, beside which the table does not stand: the run's record says where it was.
    """
    if config_path is None:
        return Inputs(declared)
    folder = Path(config_path).parent
    if declared is not None and (folder / declared).exists():
        return Inputs(str(folder / declared))
    record = folder / RECORD
    if record.is_file() and (folder / "run.json").is_file():
        known = read_record(record)
        name = known.get("dataset")
        if name is not None and (Path(name).exists() or not Path(name).is_absolute()):  # a file, or a hub dataset
            return Inputs(name, known.get("encoding"))
    return Inputs(declared)
