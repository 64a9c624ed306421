"""`luthier predict`: answers for the rows of a table."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import common

if TYPE_CHECKING:
    from luthier.tuned.bulk import Written

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
            help="Answers go here: a .csv, .jsonl or .parquet file, or a folder; else shown. "
            "Called again after it was ended, it goes on with the rows that are missing.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without what was tuned.")] = False,
    probabilities: Annotated[
        bool | None,
        typer.Option(
            "--probabilities/--no-probabilities",
            help="Say how probable the model finds each answer; where nothing is said, of a category's alone.",
        ),
    ] = None,
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
    from luthier.run.output import writing
    from luthier.tuned.bulk import predict_into
    from luthier.tuned.writing import answers_file, are_answers

    # what cannot be written is refused before the work, not after it
    kept = nullcontext() if output is None else writing(answers_file(output), are_answers)
    with kept, common.session(as_json) as sink:
        tuned = pipeline.load(
            path, overrides=sets or [], trust_remote_code=trust_remote_code, dataset=dataset, sink=sink
        )
        options = {"encoding": encoding, "use_base": base, "probabilities": probabilities, "sink": sink}
        if output is not None:
            written = predict_into(output, tuned, dataset, **options)  # type: ignore[arg-type]
            return _tell(written, sink, as_json)
        answered = tuned.predict(dataset, **options)  # type: ignore[arg-type]
    if as_json:
        common.emit({"output": None, "rows": len(answered), "answers": answered.records()} | sink.told())
        return
    for record in answered.records():
        error = f"error: {record['error']}" if "error" in record else ""
        for response in record.get("responses") or [error or record["response"]]:
            typer.echo(f"[{record['row']}] {response}")


def _tell(written: Written, heard: common.Heard, as_json: bool) -> None:
    if as_json:
        told = {"output": str(written.path), "rows": written.rows, "errors": written.errors, "answers": None}
        common.emit(told | heard.told())
        return
    failed = f"; {written.errors} rows could not be answered, the column error says why" if written.errors else ""
    typer.echo(f"{written.rows} answers written to {written.path}{failed}")
