"""What a run begins with where its adapter's start is not drawn: the rows it looks at, the file where it is kept."""

from __future__ import annotations

from pathlib import Path

from luthier.config import Config
from luthier.data.source import TableSource
from luthier.errors import ConfigError, RunError
from luthier.pipeline.forking import Origin
from luthier.run import RunFolder, atomic
from luthier.types import Example


def first_rows(settings: Config, source: TableSource) -> list[Example]:
    """The examples that the start looks at: the first that ``source`` would train on, at most an epoch of them."""
    section, out = settings.adapter, []
    if not getattr(section, "looks_at_rows", False):
        return []
    for _ in range(source.steps_per_epoch):
        out += source.next_step()
        if len(out) >= section.init_rows:  # type: ignore[union-attr]
            break
    return out[: section.init_rows]  # type: ignore[union-attr]


def kept_start(settings: Config, folder: RunFolder, origin: Origin | None, *, first: bool = True) -> Path | None:
    """The file of the start, which a run that goes on or starts from another one has to find; None where it is drawn.

    The ``first`` rank looks after it, the others read it when it is there.
    Raises RunError when it is gone, ConfigError when the run to start from has begun otherwise.
    """
    from luthier.model import starts
    from luthier.train import checkpoint

    section = settings.adapter
    if section is None or starts.kind_of(section) is None:
        return None
    if folder.start.is_file() or not first:
        return folder.start
    if checkpoint.steps_in(folder.checkpoints):
        raise RunError(
            "run-damaged",
            "the factors that the run began with are gone, and what was trained goes with them",
            where=str(folder.start),
            received="no such file",
            allowed="the file as the training wrote it",
            fix="put the file back, or begin again in another --output folder",
        )
    theirs = RunFolder.load(origin.run, trained=False).start if origin is not None else None
    if theirs is not None and theirs.is_file():
        atomic.write_bytes(folder.start, theirs.read_bytes())
    elif theirs is not None and starts.takes(section):
        raise ConfigError(
            "config-conflict",
            "the run to start from began with other factors than this start makes, and its weights belong to those",
            where="adapter.init_lora_weights",
            received=str(section.init_lora_weights),  # type: ignore[union-attr]
            fix="keep `adapter` as it is in that run, or train without --fork",
        )
    return folder.start
