"""`luthier convert`: pickled weights become safetensors, read with weights_only in a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common

NAME = "convert"
EXAMPLES = ("luthier convert ./old-model",)


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder that only has .bin weights.")],
    as_json: common.Json = False,
) -> None:
    """Convert a folder's pickled .bin weights to safetensors. What the pickle says is not run."""
    from luthier.assets import convert_pickled

    with common.session(as_json) as sink:
        made = convert_pickled(folder, sink)
    if as_json:
        common.emit({"folder": str(made)} | sink.told())
    else:
        typer.echo(f"converted: base_model: {made}")
