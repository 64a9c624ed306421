"""The command line: one file per command, nothing heavy imported before a command runs."""

from __future__ import annotations

import shlex
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import typer

from luthier import __version__
from luthier.cli import chat, check, convert, doctor, evaluate, init, plan, predict, runs, schema, train
from luthier.cli.common import emit, nothing_to_interrupt, report_failure
from luthier.errors import ConfigError, LuthierError, TrainingError
from luthier.parallel import place
from luthier.secrets import hidden

app = typer.Typer(
    name="luthier",
    help="Fine-tune language models on your own data: you declare the math, Luthier plans the execution.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # long options whole and lines to copy, in half the time of rich's panels
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: luthier init my_data.csv. A failure prints a code; docs/errors explains each. "
    "Put --debug anywhere on the line to see a traceback.",
)
for module in (init, check, plan, train, evaluate, predict, chat, runs, schema, doctor, convert):
    examples = "\n".join(f"  {example}" for example in module.EXAMPLES)
    app.command(module.NAME, epilog=f"\b\nFor example:\n{examples}")(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luthier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of failures."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of every command; `main` reads --debug wherever it stands."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


REPORT = "this is a fault of Luthier: please report it, with what the same command prints with --debug"


# Made now: when there is no memory, nothing is.
NO_MEMORY = TrainingError(
    "training-no-memory",
    "this machine has no memory left for that",
    received="no free memory",
    fix="end other programs, or choose a smaller base (`luthier plan` shows what fits)",
)

# The parser's own error, of the click that typer uses; some versions of typer bring one of their own.
UsageError: Any = typer.BadParameter.__base__


def _asks_for_help(error: Any) -> bool:
    """Whether nothing was said on the line: the parser's error is then the help itself."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _misused(error: Any) -> ConfigError:
    """A command line that cannot be understood, as the other errors are said."""
    path = error.ctx.command_path if error.ctx is not None else "luthier"
    return ConfigError(
        "config-usage",
        error.format_message(),
        where=path,
        received=shlex.join(sys.argv[1:]),
        allowed=error.ctx.get_usage().removeprefix("Usage: ") if error.ctx is not None else None,
        fix=f"{path} --help",
    )


def _show_traceback() -> None:
    typer.echo(hidden(traceback.format_exc()), err=True)


def _ended(code: str | int | None) -> SystemExit:
    """The end with this exit code; a signal is told. A training says more: see luthier.errors.Interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if code == 128 + number and place().first:
            typer.echo(f"ended by {number.name}; the same command does it again", err=True)
    return SystemExit(code)


def main() -> None:
    """Run the command line. Failures end with the exit code of their kind (see luthier.errors), Ctrl-C with 130."""
    signal.signal(signal.SIGTERM, _terminate)
    debug, as_json = "--debug" in sys.argv[1:], "--json" in sys.argv[1:]
    try:
        words = [word for word in sys.argv[1:] if word != "--debug"]
        code = app(words, prog_name="luthier", standalone_mode=False)
        nothing_to_interrupt()
        sys.exit(code)
    except UsageError as error:
        if as_json or not _asks_for_help(error):
            if not as_json and place().first and error.ctx is not None:
                typer.echo(error.ctx.get_usage(), err=True)
            report_failure(_misused(error), as_json)
        elif place().first:
            error.show()
        raise SystemExit(error.exit_code) from None
    except LuthierError as error:
        if debug:
            _show_traceback()
        report_failure(error, as_json)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise _ended(130) from None
    except SystemExit as end:
        raise _ended(end.code) from None
    except MemoryError:
        report_failure(NO_MEMORY, as_json)
        raise SystemExit(NO_MEMORY.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:  # a fault of ours, or of a library below us
        if debug:
            _show_traceback()
        said = hidden(f"{type(error).__name__}: {error}")
        if as_json and place().first:
            emit({"error": [{"code": "unexpected", "message": said, "fix": REPORT}], "exit_code": 1})
        else:
            typer.echo(f"error [unexpected] {said}\n  fix:      {REPORT}", err=True)
        raise SystemExit(1) from None
