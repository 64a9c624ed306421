"""The disk that a run takes before and while it trains: what is still to be downloaded, and its folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.pipeline.planning import Estimate
from luthier.run.folder import SPARE


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes for the base's ``download`` and for the ``run`` folder, and what is ``free`` where each goes, here."""

    download: int
    run: int
    free: tuple[int, int]  # of the hub's cache, of the run's folder
    shared: bool  # both are on one disk

    @property
    def enough(self) -> bool:
        """Whether both have room, with a tenth to spare, as training asks for."""
        sizes = (self.download + self.run,) * 2 if self.shared else (self.download, self.run)
        return all(free >= SPARE * size for free, size in zip(self.free, sizes, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The sizes as JSON types."""
        free = {"download": self.free[0], "run": self.free[1]}
        return {"download": self.download, "run": self.run, "free": free, "enough": self.enough}


def space_of(found: Estimate, folder: Path, cache: Path) -> Space:
    """What ``found`` takes of the disks of ``folder``, where its run will be, and of ``cache``, the hub's."""
    places = _there(cache), _there(folder)
    one_disk = places[0].stat().st_dev == places[1].stat().st_dev
    free = (shutil.disk_usage(places[0]).free, shutil.disk_usage(places[1]).free)
    return Space(found.need.base.download, found.disk, free, one_disk)


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
