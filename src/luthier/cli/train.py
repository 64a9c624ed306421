"""`luthier train`: one config and one table become a tuned model in a run folder."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli import common

NAME = "train"
EXAMPLES = (
    "luthier train config.yaml --output my-run",
    "luthier train config.yaml --set trainer.epochs=1 --set trainer.learning_rate=1e-4",
)


def command(
    config: common.ConfigArgument = None,
    config_option: common.ConfigOption = None,
    dataset: common.Dataset = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "--output_directory", "-od", "-o", help="The run folder, exactly; default runs/…"),
    ] = None,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Fine-tune the base model that CONFIG names on your data; a run folder comes out."""
    path = common.one_of(config, config_option, "CONFIG", "--config")
    settings = common.load_config(path, sets)
    data = common.dataset_of(settings, dataset, path, encoding)
    from luthier import pipeline

    with common.session(as_json) as sink:
        trained = pipeline.train(
            settings,
            data.dataset,
            output=output,
            encoding=data.encoding,
            trust_remote_code=trust_remote_code,
            sink=sink,
        )
    if as_json:
        common.emit(trained.to_json())
        return
    typer.echo(f"\ntrained: {trained.folder}")
    typer.echo(f"  report    {trained.folder / 'report.html'}")
    typer.echo(f"  next      luthier evaluate {trained.folder}   # did it help?")
    typer.echo(f"            luthier chat {trained.folder}")
