"""`luthier chat`: talk to a tuned model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli import common
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.tuned.conversation import Conversation

NAME = "chat"
EXAMPLES = ("luthier chat my-run", "luthier chat my-run --system 'Answer in one sentence.'")
HELP = """\
/reset          forget the turns so far; the system prompt stays
/base MESSAGE   ask the base model, before it was tuned
/compare MESSAGE  ask both; the tuned answer joins the conversation
/set COLUMN TEXT  what another column of the template holds, where the model learned from one
/temp NUMBER    sharpness of the draw from now on: 0 is greedy, 1 the model's own distribution
/help           this list
/quit           end"""


def command(
    run: common.RunArgument = None,
    run_option: common.RunOption = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="A system prompt; default: the one that all rows of training have. '': none."),
    ] = None,
    sets: common.Set = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Chat with the tuned model of RUN. /base and /compare ask the base model too; /help lists the rest."""
    path = common.one_of(run, run_option, "RUN", "--model_path")
    from luthier import pipeline

    with common.session(as_json) as sink:
        tuned = pipeline.load(path, overrides=sets or [], trust_remote_code=trust_remote_code, sink=sink)
        conversation = tuned.chat(system=system, sink=sink)
    interactive = sys.stdin.isatty()
    if conversation.column is not None and (conversation.others or not conversation.is_chat):
        _say_template(conversation)
    if interactive:
        typer.echo("Type a message. /help lists what else there is, Ctrl-C ends an answer, /quit ends.", err=as_json)
    Chat(conversation, as_json).run(interactive)


def _say_template(conversation: Conversation) -> None:
    """Say on stderr what a message means to a model that learned from a template: piped answers stay alone."""
    if conversation.goes_on:
        typer.echo("This model learned running text: it goes on from a message, each by itself.", err=True)
        return
    filled = f"the first message fills {{{conversation.column}}}"
    if not conversation.is_chat:
        filled = f"a message fills {{{conversation.column}}}, by itself"
    typer.echo(f"This model learned from a template: {filled}.", err=True)
    for name, value in conversation.others.items():
        said = f"is {value!r}" if value else f"is empty; /set {name} TEXT fills it"
        typer.echo(f"  {{{name}}} {said}", err=True)


class Chat:
    """Reads lines and shows answers. An answer that fails or is broken off leaves the conversation as it was."""

    def __init__(self, conversation: Conversation, as_json: bool) -> None:
        self.conversation, self.as_json = conversation, as_json
        self.generation: dict[str, Any] = {}
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda rest: self.conversation.reset(),
            "/base": lambda rest: self._answer(rest, use_base=True),
            "/compare": self._compare,
            "/set": self._set,
            "/temp": self._temperature,
            "/help": lambda rest: typer.echo(HELP, err=self.as_json),  # stdout holds answers alone
        }

    def run(self, interactive: bool) -> None:
        """Until /quit or the end of the input."""
        while True:
            if interactive:
                typer.echo("> ", nl=False, err=self.as_json)
            line = sys.stdin.readline()
            text = line.strip()
            if not line or text == "/quit":
                return
            if text:
                self._take(text, interactive)

    def _take(self, text: str, interactive: bool) -> None:
        name, _, rest = text.partition(" ")
        try:
            if name in self.commands:
                self.commands[name](rest.strip())
            elif name.startswith("/") and name[1:].isalpha():
                self._say_fault(f"there is no {name}; /help lists what there is")
            else:
                self._answer(text)
        except (LuthierError, ValueError) as error:  # the conversation goes on
            self._say_fault(str(error))
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.echo("")

    def _answer(self, text: str, *, use_base: bool = False, remember: bool = True, label: str = "") -> None:
        if not text:
            raise ValueError("a message has to follow")
        pieces = self.conversation.say(text, use_base=use_base, generation=self.generation, remember=remember)
        if self.as_json:
            common.emit({"answer": "".join(pieces), "base": use_base}, line=True)
            return
        typer.echo(label, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo("")

    def _compare(self, text: str) -> None:
        self._answer(text, use_base=True, remember=False, label="base:  ")
        self._answer(text, label="tuned: ")

    def _set(self, text: str) -> None:
        column, _, value = text.partition(" ")
        self.conversation.fill(column, value.strip())
        if self.conversation.has_begun:  # stdout holds answers alone
            typer.echo(f"{{{column}}} shapes the first message, which has been said: it holds after /reset", err=True)

    def _temperature(self, text: str) -> None:
        from luthier.infer.sampling import resolve

        value = {"temperature": float(text)} if text.replace(".", "", 1).isdigit() else {"temperature": text}
        resolve(None, value)  # raises what is wrong with it
        self.generation = value

    def _say_fault(self, message: str) -> None:
        if self.as_json:
            common.emit({"error": message}, line=True)
        else:
            typer.echo(message, err=True)
