"""`luthier train`: one config and one table become a tuned model in a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import common
from luthier.errors import RunError
from luthier.parallel import place

if TYPE_CHECKING:
    from luthier.pipeline import Trained

NAME = "train"
EXAMPLES = (
    "luthier train config.yaml --output my-run",
    "luthier train --resume my-run",
    "luthier train config.yaml --fork my-run --set trainer.learning_rate=5e-5",
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
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with an unfinished run, as it was begun.")
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork",
            metavar="RUN",
            help="Start a new run from the weights of this run's newest checkpoint, or of "
            "RUN/checkpoints/step-…; optimizer and schedule begin anew.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            "--mirror",
            metavar="DIR|URL",
            help="Copy each checkpoint there (a drive, hf://…, s3://…); on a new "
            "machine the same command goes on from it.",
        ),
    ] = None,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Tune the base model of CONFIG on your data, into a run folder."""
    if resume is not None:
        if config or config_option or output or fork:
            raise typer.BadParameter("--resume takes all from the run: leave CONFIG, --output and --fork out")
        config, output = _begun(resume)
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
            fork=fork,
            mirror=mirror,
            sink=sink,
        )
    common.nothing_to_interrupt()
    if as_json:
        common.emit(trained.to_json() | sink.told())
    elif place().first:
        _show(trained)


def _show(trained: Trained) -> None:
    """Where the run is and what to do with it; comparing takes held-out rows with answers."""
    folder, held_out = trained.named, trained.rows["validation"] or trained.rows["test"]
    has_answers = bool(held_out) and trained.tuned.layout.kind != "text"
    typer.echo(f"\ntrained: {folder}")
    typer.echo(f"  report    {folder / 'report.html'}")
    steps = ([f"luthier evaluate {folder}   # did it help?"] if has_answers else []) + [f"luthier chat {folder}"]
    for at, step in enumerate(steps):
        typer.echo(f"  {'' if at else 'next':<8}  {step}")


def _begun(run: str) -> tuple[str, str]:
    """The config and the folder of a run. Raises RunError when it had not begun."""
    from luthier.run import RunFolder

    folder = RunFolder.load(run, trained=False).path
    config = folder / "config.yaml"
    if not config.is_file():
        raise RunError(
            "run-not-a-run",
            "the run ended before it had recorded its config",
            where=str(folder),
            received="a run without config.yaml",
            allowed="a run with its config.yaml",
            fix=f"luthier train CONFIG --output {folder}",
        )
    return str(config), str(folder)
