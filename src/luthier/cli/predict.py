"""`luthier predict`: answers for the rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import common

NAME = "predict"
EXAMPLES = ("luthier predict my-run --dataset new.csv --output answers.csv",)


def command(
    run: common.RunArgument = None,
    run_option: common.RunOption = None,
    dataset: common.Dataset = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--output_directory",
            "-od",
            "-o",
            help="Answers go here: a .csv, .jsonl or .parquet file, or a folder; else shown.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without what was tuned.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also say how probable the model finds each answer.")
    ] = False,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Answer every row of --dataset with the tuned model."""
    path = common.one_of(run, run_option, "RUN", "--model_path")
    if dataset is None:
        raise typer.BadParameter("--dataset names the table to answer")
    from luthier import pipeline
    from luthier.tuned.answered import answers_file

    written = None
    if output is not None:
        answers_file(output)  # a name that cannot be written is refused before the work, not after it
    with common.session(as_json) as sink:
        tuned = pipeline.load(path, overrides=sets or [], trust_remote_code=trust_remote_code, sink=sink)
        answered = tuned.predict(dataset, encoding=encoding, use_base=base, probabilities=probabilities, sink=sink)
    if output is not None:
        written = answered.write(output)
    if as_json:
        common.emit({"output": written, "rows": len(answered), "answers": answered.records() if not written else None})
    elif written:
        typer.echo(f"{len(answered)} answers written to {written}")
    else:
        for record in answered.records():
            typer.echo(f"[{record['row']}] {record['response']}")
