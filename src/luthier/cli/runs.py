"""`luthier runs`: list run folders, compare them, verify one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common
from luthier.errors import RunError

NAME = "runs"
BESIDE = 3  # runs whose values stand side by side; more are too narrow to read
EXAMPLES = ("luthier runs", "luthier runs my-run other-run", "luthier runs verify my-run")


def command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Runs to compare, or a folder that holds runs; default runs/."),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List runs with their results, compare them, verify one. Two or more RUNs, named each: what differs.

    That is their config keys, and the table, base, tokenizer, template and versions that they were made from.

    `luthier runs verify RUN` reads every byte of its checkpoints and model and names what is not as it was written.
    """
    from luthier.run import summary

    if folders and folders[0] == Path("verify") and len(folders) > 1:
        _verify(folders[1:], as_json)
        return
    here = Path("runs")
    found = summary.summarise(folders or ([here] if here.is_dir() else []))
    compared = summary.summarise([folder for folder in folders or [] if summary.is_run(folder)])
    differences = summary.differences(compared)
    if as_json:
        common.emit({"runs": [run.to_json() for run in found], "differences": differences})
        return
    if not found:
        places = ", ".join(str(folder) for folder in folders or [here])
        typer.echo(f"no runs in {places} yet: `luthier train CONFIG` makes one there, or name another folder")
        return
    from rich.console import Console

    from luthier import console

    out = Console()
    out.print(console.table("Runs", summary.HEADINGS, [run.cells() for run in found]))
    if len(compared) > 1:
        names = [run.name for run in compared]
        if len(names) <= BESIDE:
            rows = [[key, *values] for key, values in differences.items()]
            out.print(console.table("What differs", ["key", *names], rows))
        else:
            typer.echo("\nWhat differs\n" + "\n".join(_block(key, names, of) for key, of in differences.items()))


def _block(key: str, names: list[str], values: list[str]) -> str:
    """A key, and under it each value with the runs that have it."""
    by_value: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        by_value.setdefault(value, []).append(name)
    return "\n".join([key, *(f"  {value}: {', '.join(having)}" for value, having in by_value.items())])


def _verify(folders: list[Path], as_json: bool) -> None:
    """Print what was found; ends with the exit code of a damaged run when anything is."""
    from luthier.run import RunFolder
    from luthier.run.verify import verify

    found = {str(folder): verify(RunFolder.load(folder, trained=False)) for folder in folders}
    if as_json:
        common.emit({run: [one.to_json() for one in verdicts] for run, verdicts in found.items()})
    for run, verdicts in found.items() if not as_json else ():
        typer.echo(run if verdicts else f"{run}: nothing written yet")
        for one in verdicts:
            said = "; ".join(one.faults) if one.faults else "whole" if one.known else "no manifest to compare with"
            typer.echo(f"  {one.what}: {said}")
    if any(one.faults for verdicts in found.values() for one in verdicts):
        raise typer.Exit(RunError.exit_code)
