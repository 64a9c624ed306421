"""`luthier chat`: talk to a tuned model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from luthier.cli import common

NAME = "chat"
EXAMPLES = ("luthier chat my-run",)


def command(
    run: common.RunArgument = None,
    run_option: common.RunOption = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    sets: common.Set = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Chat with the tuned model of RUN. /reset forgets, /base asks the base model, /quit ends."""
    path = common.one_of(run, run_option, "RUN", "--model_path")
    from luthier import pipeline

    with common.session(as_json) as sink:
        tuned = pipeline.load(path, overrides=sets or [], trust_remote_code=trust_remote_code, sink=sink)
    conversation = tuned.chat(system=system)
    interactive = sys.stdin.isatty()
    if interactive and conversation.column is not None:
        typer.echo(f"This model learned from a template: a message fills {{{conversation.column}}}, by itself.")
    if interactive:
        typer.echo("Type a message. /reset forgets the history, /base asks the base model, /quit ends.")
    while True:
        if interactive:
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        text = line.rstrip("\n")
        if text.strip() == "/reset":
            conversation.reset()
            continue
        use_base = text.startswith("/base ")
        pieces = conversation.say(text.removeprefix("/base "), use_base=use_base)
        if as_json:
            common.emit({"answer": "".join(pieces), "base": use_base})
            continue
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo("")
