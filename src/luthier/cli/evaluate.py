"""`luthier evaluate`: base against tuned on held-out rows. Did it help?"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common
from luthier.errors import ConfigError

NAME = "evaluate"
EXAMPLES = ("luthier evaluate my-run --rows 50",)


def command(
    run: common.RunArgument = None,
    run_option: common.RunOption = None,
    dataset: common.Dataset = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most this many rows.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Examples shown to the base model; 0: none.")] = 3,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many answers to show side by side.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--output_directory",
            "-od",
            "-o",
            help="The comparison goes here too, beside the run folder: a .json file, or a folder.",
        ),
    ] = None,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Compare the tuned model with its base on held-out rows. The base answers with a few-shot prompt too."""
    path = common.one_of(run, run_option, "RUN", "--model_path")
    from luthier import pipeline
    from luthier.run import RunFolder, atomic
    from luthier.run.output import json_with, writing

    file = None if output is None else _file(output)
    with (
        nullcontext() if file is None else writing(file, json_with("contestants", "flips")),
        common.session(as_json) as sink,
    ):
        tuned = pipeline.load(
            path, overrides=sets or [], trust_remote_code=trust_remote_code, dataset=dataset, sink=sink
        )
        comparison = pipeline.evaluate(tuned, dataset, rows=rows, shots=shots, encoding=encoding, sink=sink)
        if file is not None:
            atomic.write_json(file, comparison.to_json())
    if as_json:
        common.emit(comparison.to_json() | sink.told())
        return
    from luthier import console

    console.show_comparison(comparison.to_json(), samples)
    if tuned.folder is not None:
        typer.echo(f"\nfull report: {RunFolder.load(path).path / 'report.html'}")


def _file(output: Path) -> Path:
    """The file of the comparison; a folder, or a name without an ending, gets an evaluation.json.

    Raises ConfigError config-bad-value for another ending.
    """
    if output.suffix == ".json":
        return output
    if output.is_dir() or not output.suffix:
        return output / "evaluation.json"
    raise ConfigError(
        "config-bad-value",
        f"{output.name} is neither a .json file nor a folder",
        where="--output",
        received=str(output),
        allowed="a .json file, or a folder in which evaluation.json is written",
        fix=f"--output {output.with_suffix('.json')}",
    )
