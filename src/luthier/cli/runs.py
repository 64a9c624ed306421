"""`luthier runs`: list run folders, compare them, verify one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common
from luthier.errors import RunError

NAME = "runs"
EXAMPLES = ("luthier runs", "luthier runs my-run other-run", "luthier runs verify my-run")


def command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Runs to compare, or a folder that holds runs; default runs/."),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List runs with their results, compare them, verify one. Two or more RUNs: the keys that differ.

    `luthier runs verify RUN` reads every byte of its checkpoints and model and names what is not as it was written.
    """
    from luthier.run import summary

    if folders and folders[0] == Path("verify") and len(folders) > 1:
        _verify(folders[1:], as_json)
        return
    here = Path("runs")
    found = summary.summarise(folders or ([here] if here.is_dir() else []))
    if as_json:
        common.emit({"runs": [run.to_json() for run in found], "differences": summary.differences(found)})
        return
    if not found:
        places = ", ".join(str(folder) for folder in folders or [here])
        typer.echo(f"no runs in {places} yet: `luthier train CONFIG` makes one there, or name another folder")
        return
    from rich.console import Console

    from luthier import console

    out = Console()
    out.print(console.table("Runs", summary.HEADINGS, [run.cells() for run in found]))
    if folders and len(found) > 1:
        rows = [[key, *values] for key, values in summary.differences(found).items()]
        out.print(console.table("What differs", ["key", *[run.name for run in found]], rows))


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
