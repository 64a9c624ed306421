"""TensorBoard, MLflow, Weights & Biases and trackio as sinks: each gets the numbers that metrics.jsonl gets."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import DependencyError, LuthierError, missing_extra
from luthier.events import Event, Sink, Stepped, Warned
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


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any], sink: Sink
) -> Iterator[list[Sink]]:
    """The trackers of these names, open for one run and closed with it, so that one process can train again.

    One that fails while the run goes on is told once and left out from then: hours of training do not end because a
    server went away. Raises DependencyError when one is not installed or cannot begin.
    """
    with ExitStack() as closing:
        opened: list[Sink] = []
        for name in names:
            guarded = _Guarded(name, open_tracker(name, folder, run_name, config), sink)
            closing.callback(guarded.close)
            opened.append(guarded)
        yield opened


def open_tracker(name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name for one run. Raises DependencyError when it is not installed or cannot begin."""
    try:
        with redirect_stdout(sys.stderr):  # some greet on stdout, which belongs to the command's result
            return TRACKERS.get(name, where="trainer.track")(folder, run_name, config)
    except LuthierError:
        raise
    except Exception as error:  # whatever the package raises: no login, no server, no right to write
        raise DependencyError(
            "dependency-failed",
            f"{name} is installed and could not begin: {error}",
            where="trainer.track",
            received=name,
            fix=f"set {name} up as it says (login, address of its server), or take it out of trainer.track",
        ) from error


class _Guarded:
    """A tracker whose failure is a warning, once, and its end."""

    def __init__(self, name: str, tracker: Tracker, sink: Sink) -> None:
        self.name, self.tracker, self.sink, self.failed = name, tracker, sink, False

    def __call__(self, event: Event) -> None:
        self._try(lambda: self.tracker(event))

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._try(self.tracker.close)

    def _try(self, do: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            do()
        except Exception as error:  # the tracker's own, of whatever kind
            self.failed = True
            told = f"{self.name} gets no more numbers of this run ({error}); metrics.jsonl has them all"
            self.sink(Warned(text=told))


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
