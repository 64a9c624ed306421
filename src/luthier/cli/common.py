"""What the commands share: their common options, the sink of a command, results as JSON."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier import events
from luthier.errors import ConfigError, LuthierError
from luthier.parallel import place

if TYPE_CHECKING:
    from luthier.config import Config
    from luthier.run import Inputs

FIRST_SPEAKS = 15.0  # seconds that rank 0 has to tell what all ranks failed with
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; progress is silent.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key, e.g. --set trainer.epochs=1. Repeatable."),
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="CSV, TSV, JSON, JSONL, Parquet, Excel, a saved dataset folder, or a hub id."),
]
ConfigArgument = Annotated[str | None, typer.Argument(metavar="CONFIG", help="The config file (YAML).")]
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="The config file, in Ludwig's spelling.")]
RunArgument = Annotated[str | None, typer.Argument(metavar="RUN", help="A run folder.")]
RunOption = Annotated[
    str | None, typer.Option("--model_path", "-m", help="The run folder, in Ludwig's spelling.", show_default=False)
]
Encoding = Annotated[str | None, typer.Option("--encoding", help="The text encoding of the dataset, e.g. cp932.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the base model run code of its own. Only this flag can.")
]


def one_of(positional: str | None, option: str | None, name: str, flag: str) -> str:
    """The value given either way round; both or neither is a usage error."""
    if positional is None and option is None:
        raise typer.BadParameter(f"{name} is missing: give it as an argument, or with {flag}")
    if positional is not None and option is not None:
        raise typer.BadParameter(f"{name} is given twice: as the argument {positional!r} and with {flag} {option!r}")
    return positional if positional is not None else str(option)


def load_config(path: str, overrides: list[str] | None, **given: Any) -> Config:
    """The config of a command; ``given`` are top-level keys that options of the command set."""
    from luthier import config

    extra = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return config.load(Path(path), [*extra, *(overrides or [])])


def dataset_of(config: Config, option: str | None, config_path: str, encoding: str | None = None) -> Inputs:
    """The dataset of a command and its encoding: the option, or the config's own as `recorded_inputs` finds it."""
    from luthier.run import Inputs, recorded_inputs

    if option is not None:
        return Inputs(option, encoding)
    known = recorded_inputs(config.dataset, config_path)
    if known.dataset is None:
        raise ConfigError(
            "config-conflict",
            "no dataset is named",
            where=f"{config_path} dataset",
            received="no --dataset, and no `dataset:` in the config",
            allowed="a file, a saved dataset folder, or a hub id",
            fix="pass --dataset FILE, or write `dataset: FILE` in the config",
        )
    return Inputs(known.dataset, encoding or known.encoding)


@dataclass(frozen=True)
class Heard:
    """The sink of a command's events, which keeps what a result as JSON has to tell beside itself."""

    sink: events.Sink
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __call__(self, event: events.Event) -> None:
        """Pass an event on, and keep the line of it that a person should see."""
        if isinstance(event, events.Note):
            self.notes.append(event.text)
        elif isinstance(event, events.Warned):
            self.warnings.append(event.text)
        elif isinstance(event, events.Rewound):
            self.warnings.append(f"back to step {event.step}: {event.why}")
        self.sink(event)

    def told(self) -> dict[str, Any]:
        """The lines as JSON types, in the order in which they were told."""
        return {"notes": self.notes, "warnings": self.warnings}


@contextmanager
def session(as_json: bool) -> Iterator[Heard]:
    """The sink of this command's events; it prints nothing when the result goes out as JSON."""
    from luthier import console

    with console.sink(quiet=as_json or not place().first) as sink:
        yield Heard(sink)


def emit(result: Mapping[str, Any], *, line: bool = False) -> None:
    """Print a result as one JSON object on stdout, as a ``line`` where more follow; of several ranks the first does."""
    if not place().first:
        return
    indent = None if line else 1
    sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=indent, default=str) + "\n")
    if line:
        sys.stdout.flush()  # whoever waits for it reads it now


def nothing_to_interrupt() -> None:
    """From here on a signal changes nothing: the work is done, and what was loaded for it takes its time to go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def report_failure(error: LuthierError, as_json: bool) -> None:
    """Print an explained failure, for people or for machines; what all ranks fail with, once.

    torchrun ends all processes as soon as one has ended. So the others wait until rank 0 has spoken, and one that still
    lives after that has failed alone and speaks itself.
    """
    if not place().first:
        time.sleep(FIRST_SPEAKS)
    elif as_json:
        emit({"error": [fault.to_json() for fault in error.faults], "exit_code": error.exit_code})
        return
    from luthier import console

    console.show_error(error)
