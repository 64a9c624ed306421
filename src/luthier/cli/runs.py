"""`luthier runs`: list run folders and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common

NAME = "runs"
EXAMPLES = ("luthier runs", "luthier runs my-run other-run")


def command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Runs to compare, or a folder that holds runs; default runs/.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List runs with their state and results; two or more RUNs are compared, differing keys shown."""
    from luthier.run import summary

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
