"""`luthier schema`: the JSON Schema of the config, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common

NAME = "schema"
EXAMPLES = ("luthier schema --output config.schema.json",)


def command(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
    as_json: common.Json = False,
) -> None:
    """Print the JSON Schema of config.yaml. Editors complete and check with it."""
    from luthier import config
    from luthier.run import atomic
    from luthier.run.output import json_with, writing

    if output is None:
        common.emit(config.json_schema())
    else:
        with writing(output, json_with("$schema", "properties")):
            atomic.write_json(output, config.json_schema())
        if as_json:
            common.emit({"schema": str(output)})
        else:
            typer.echo(f"wrote {output}")
