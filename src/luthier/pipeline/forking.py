"""A new run that starts, on purpose, from the weights of another run's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.errors import AssetError, RunError
from luthier.run import RunFolder, manifest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from; ``sha256`` is of its manifest, which names all of its content."""

    run: str
    step: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The origin as JSON types."""
        return asdict(self)


def origin_of(given: str | Path, sink: events.Sink = events.silent) -> Origin:
    """The newest whole checkpoint of a run, or the one named (``RUN/checkpoints/step-000120``).

    Raises RunError: run-not-a-run, run-damaged when it has no whole checkpoint.
    """
    from luthier.train import checkpoint

    path = Path(given)
    named = path.parent.name == "checkpoints"
    run = RunFolder.load(path.parent.parent if named else path, trained=False)
    steps = [checkpoint.step_of(path)] if named else checkpoint.steps_in(run.checkpoints)
    for step in reversed(steps):
        try:
            checkpoint.load(run.checkpoints, step)
        except RunError as error:
            if step == steps[0]:
                raise
            sink(events.Warned(text=f"{error.faults[0].message}; starting from the one before it"))
            continue
        name = checkpoint.path_of(run.checkpoints, step) / manifest.NAME
        return Origin(str(run.path.resolve()), step, manifest.hash_of(name))
    raise RunError(
        "run-not-a-run",
        "the run has no checkpoint to start from",
        where=str(run.path),
        received=f"a run whose state is {run.state!r}, without checkpoints",
        allowed="a run with a checkpoint",
        fix="train it on",
    )


def weights_of(origin: Origin, base_hash: str) -> Mapping[str, torch.Tensor]:
    """The trained weights of the checkpoint. Raises RunError when it is gone, AssetError when its base is another."""
    from luthier.train import checkpoint

    run = RunFolder.load(origin.run, trained=False)
    if run.lock is not None and run.lock.base_hash != base_hash:
        raise AssetError(
            "asset-wrong-base",
            "the run to start from was trained on another base model",
            where=origin.run,
            received=f"{base_hash[:16]}…",
            allowed=f"{run.lock.base_name}, {run.lock.base_hash[:16]}…",
            fix="keep base_model as it is in that run, or train without --fork",
        )
    return checkpoint.load(run.checkpoints, origin.step).weights
