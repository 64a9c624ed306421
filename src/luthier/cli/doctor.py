"""`luthier doctor`: what this machine has, and what is supported where."""

from __future__ import annotations

import typer

from luthier.cli import common

NAME = "doctor"
EXAMPLES = ("luthier doctor",)


def command(as_json: common.Json = False) -> None:
    """Say what this machine has and what it can do. Cores, memory, GPUs, packages, proxies; and what runs where."""
    from luthier import doctor

    report = doctor.examine()
    if as_json:
        common.emit(report.to_json())
        return
    from rich.console import Console

    from luthier import console

    out = Console()
    out.print(console.table("This machine", ["what", "found"], report.machine_rows()))
    out.print(console.table("Packages", ["package", "version", "what it is for"], report.package_rows()))
    out.print(console.table("Supported where", ["platform", "trains in", "4/8 bit", "tested"], report.support_rows()))
    for line in report.advice:
        typer.echo(line)
