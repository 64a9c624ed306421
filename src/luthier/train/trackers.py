"""TensorBoard, MLflow, Weights & Biases and trackio as sinks: each gets the numbers that metrics.jsonl gets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import missing_extra
from luthier.events import Event, Stepped
from luthier.registry import Registry


class Tracker(Protocol):
    """A sink that has to be closed when the run ends."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Send what is left and end."""
        ...


Make = Callable[[Path, str, Mapping[str, Any]], Tracker]
TRACKERS: Registry[Make] = Registry("tracker")


def open_tracker(name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name for one run. Raises DependencyError when its package is not installed."""
    return TRACKERS.get(name, where="trainer.track")(folder, run_name, config)


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(package, "track", f"trainer.track: [{package}]") from error


class _Numbers:
    """Passes the numbers of each `Stepped` to a function as ``split/name``."""

    def __init__(self, log: Callable[[dict[str, float], int], Any], end: Callable[[], Any]) -> None:
        self.log, self.end = log, end

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            numbers = {"loss": event.loss, "epoch": event.epoch, **event.values}
            self.log({f"{event.split}/{name}": float(value) for name, value in numbers.items()}, event.step)

    def close(self) -> None:
        self.end()


@TRACKERS.register("tensorboard")
def _tensorboard(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    _package("tensorboard", "tensorboard")
    writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return _Numbers(log, writer.close)


@TRACKERS.register("mlflow")
def _mlflow(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    mlflow = _package("mlflow", "mlflow")
    mlflow.start_run(run_name=run_name)
    mlflow.log_dict(dict(config), "config.json")
    return _Numbers(lambda numbers, step: mlflow.log_metrics(numbers, step=step), mlflow.end_run)


@TRACKERS.register("wandb")
def _wandb(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    run = _package("wandb", "wandb").init(name=run_name, dir=str(folder), config=dict(config))
    return _Numbers(lambda numbers, step: run.log(numbers, step=step), run.finish)


@TRACKERS.register("trackio")
def _trackio(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    trackio = _package("trackio", "trackio")
    trackio.init(project="luthier", name=run_name, config=dict(config))
    return _Numbers(lambda numbers, step: trackio.log(numbers, step=step), trackio.finish)
