"""`luthier check`: what will be learned, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli import common

NAME = "check"
EXAMPLES = ("luthier check config.yaml --rows 5",)


def command(
    config: common.ConfigArgument = None,
    config_option: common.ConfigOption = None,
    dataset: common.Dataset = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many rendered rows to show.")] = 2,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    as_json: common.Json = False,
) -> None:
    """Show what CONFIG will learn: rows as rendered, tokens, faults. Loads no weights."""
    path = common.one_of(config, config_option, "CONFIG", "--config")
    settings = common.load_config(path, sets)
    data = common.dataset_of(settings, dataset, path, encoding)
    from luthier import pipeline

    with common.session(as_json) as sink:
        checked = pipeline.check(settings, data.dataset, encoding=data.encoding, sink=sink)
    if as_json:
        common.emit(checked.to_json() | sink.told())
        return
    from luthier import console

    console.show_check(checked.lines(), checked.samples(rows))
