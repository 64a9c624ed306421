"""`luthier init`: a commented config from a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common
from luthier.errors import RunError

NAME = "init"
EXAMPLES = ("luthier init tickets.csv --input subject,body --target queue",)


def command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Your table: CSV, TSV, JSON, JSONL, Parquet, Excel, …")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the config is written.")] = Path("config.yaml"),
    inputs: Annotated[str | None, typer.Option("--input", help="Columns of the prompt: subject,body")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The column to learn: queue")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model; default: the first proposal.")] = None,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: common.Json = False,
) -> None:
    """Propose base models for DATA and write a config to start from. Looks at the table and this machine."""
    if output.exists() and not force:
        raise RunError(
            "run-foreign-files",
            "the config file exists already",
            where=str(output),
            received=output.name,
            allowed="a file that is not there yet",
            fix="choose another --output, or pass --force to replace it",
        )
    from luthier import starter
    from luthier.run.output import writing

    with writing(output, lambda file: force), common.session(as_json) as sink:
        made = starter.write_config(
            data,
            output,
            inputs=inputs.split(",") if inputs else None,
            target=target,
            base=base,
            encoding=encoding,
            sets=sets or (),
            sink=sink,
        )
    if as_json:
        common.emit(made.to_json() | sink.told())
        return
    from rich.console import Console

    from luthier import console

    out = Console()
    for line in made.lines:
        out.print(line, markup=False, highlight=False)
    rows = [[p.candidate.name, p.candidate.licence, p.reason] for p in made.proposals]
    out.print(console.table("Base models, first choice first", ["base_model", "licence", "why"], rows))
    typer.echo(f"\nwrote {output}. Next: luthier check {output}, then luthier train {output}")
