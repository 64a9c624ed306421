"""A conversation with a tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.data.render.template import RESERVED, fields_of
from luthier.errors import ConfigError
from luthier.numbers import dumps
from luthier.types import Engine, Message

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned

LOOKED_AT = 1000  # rows of training in which a column may hold the same text


class Conversation:
    """Turns with one model, each written as training wrote its rows.

    A model that learned conversations is given the turns so far. One that learned from columns is asked the way it was
    taught: the message fills one of them (``column``), the first one whose text differs between the rows of training;
    the others (``others``) hold what all those rows hold, or nothing. Where the rows became turns of a chat template
    (``is_chat``), the first turn is written so and later ones as they are said; in plain text no earlier turn is shown.
    One that learned running text goes on from the message. A system turn and tools that are the same in all rows of
    training stand here too, unless another ``system`` is given; where they differ, that is told to ``sink``.
    """

    def __init__(self, tuned: Tuned, system: str | None, sink: events.Sink = events.silent) -> None:
        self._tuned = tuned
        self.is_chat, self.goes_on = tuned.renderer.is_chat, tuned.renderer.goes_on
        names = [] if tuned.layout.kind == "chat" else _columns(tuned)
        constant = _constants(tuned, names)
        self.column = next((name for name in names if name not in constant), names[0] if names else None)
        self.others: dict[str, Any] = {name: constant.get(name) for name in names if name != self.column}
        if self.column is not None and not self.is_chat and system is not None:
            raise ConfigError(
                "config-conflict",
                "a system prompt was given, and this model was trained with a plain template, which has none",
                where="system (--system)",
                received=system,
                allowed="a system prompt for a run trained on chat",
                fix="leave it out; a system prompt belongs to a run trained on chat",
            )
        opening, self.tools = _beside(tuned, system, sink) if self.is_chat else (None, None)
        self._opening = opening if system is None else Message("system", system) if system else None
        self.reset()

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.messages = [self._opening] if self._opening is not None else []
        self._engines: dict[bool, Engine] = {}  # one each for the tuned model and the base: turns are read once

    @property
    def has_begun(self) -> bool:
        """Whether the turn that the columns shape has been said, so that what they hold matters no more."""
        return self.is_chat and any(turn.role == "user" for turn in self.messages)

    def fill(self, column: str, text: str) -> None:
        """Let another column of the template hold ``text`` from now on. Raises ValueError when it has no such."""
        if column not in self.others:
            raise ValueError(f"the columns to set are {', '.join(self.others) or 'none'}; {column!r} is none of them")
        self.others[column] = text

    def say(
        self,
        text: str,
        *,
        use_base: bool = False,
        generation: Mapping[str, Any] | None = None,
        remember: bool = True,
    ) -> Iterator[str]:
        """Stream the answer to a user turn; both join the history once the answer has been read to its end.

        ``remember`` false leaves the history as it is, as an answer that is not read to its end does.

        Raises ValueError where the turns so far no longer fit into the model's context.
        """
        tuned = self._tuned
        row = dict.fromkeys(tuned.layout.inputs, text) if self.column is None else {**self.others, self.column: text}
        if self.is_chat and self.column is not None and not self.has_begun:
            text = tuned.renderer.question(row)
        asked = [*self.messages, Message("user", text)]
        plain = self.column is not None and not self.is_chat
        ids = (tuned.renderer.prompt(row) if plain else tuned.renderer.chat_prompt(asked, self.tools)).ids
        pieces = []
        if use_base not in self._engines:
            self._engines[use_base] = tuned.engine(use_base)
        engine = self._engines[use_base]
        answer = tuned.reply(row, ids, tuned.sampling(generation), use_base=use_base, engine=engine)
        with closing(answer):  # else the model would not stop with this one on every Python
            for piece in answer:
                pieces.append(piece)
                yield piece
        if remember:
            self.messages = [*asked, Message("assistant", "".join(pieces))]


def _columns(tuned: Tuned) -> list[str]:
    """The columns that a prompt is made of, in the order in which it names them."""
    template, inputs = tuned.config.prompt.template, tuned.layout.inputs
    if tuned.renderer.goes_on and tuned.layout.target is not None:
        return [tuned.layout.target]
    if template is None:
        return list(inputs)
    named = [one for field in fields_of(template) for one in (inputs if field == "__sample__" else (field,))]
    return [name for name in dict.fromkeys(named) if name not in RESERVED and name != tuned.layout.target]


def _constants(tuned: Tuned, names: Sequence[str]) -> dict[str, Any]:
    """The columns that hold the same text in all rows of training, such as one instruction for all; and that text."""
    table = tuned.table if len(names) > 1 else None  # reading it takes a while
    if table is None or len(table) < 2:
        return {}
    seen: dict[str, set[str]] = {name: set() for name in names}
    value: dict[str, Any] = {}
    for index in range(min(len(table), LOOKED_AT)):
        row = table.row(index)
        for name in names:
            value[name] = row.get(name)
            seen[name].add(str(value[name]))
    return {name: value[name] for name in names if len(seen[name]) == 1}


def _beside(tuned: Tuned, system: str | None, sink: events.Sink) -> tuple[Message | None, list[dict[str, Any]] | None]:
    """The system turn and the tools that all rows of training have; what is left out or not known is told."""
    layout, asks = tuned.layout, "--system TEXT (system=…) gives one"
    if layout.kind != "chat" and tuned.renderer.system_column is None:
        return None, None
    if (table := tuned.table) is None:
        missed = [] if system is not None else [f"a system prompt ({asks})"]
        missed += ["tools"] if layout.tools is not None else []
        if missed:
            told = f"the table of the training is not at hand ({tuned.trained_on.why})"
            sink(events.Warned(text=f"{told}: {' and '.join(missed)} that its rows may have had are not asked with"))
        return None, None
    looked_at = (tuned.renderer.beside(table.row(i), i) for i in range(min(len(table), LOOKED_AT)))
    rows = [one for one in looked_at if one is not None]
    turns = {dumps(None if turn is None else turn.to_dict()): turn for turn, _ in rows}
    tools = {dumps(each or None): each for _, each in rows}
    if len(turns) > 1 and system is None:
        sink(events.Warned(text=f"the system prompts differ between the rows of training: none is asked with; {asks}"))
    if len(tools) > 1:
        sink(events.Warned(text="the tools differ between the rows of training: none are asked with"))
    turn = next(iter(turns.values())) if len(turns) == 1 else None
    if turn is not None and system is None:
        sink(events.Note(text=f"the system prompt of all rows of training opens the conversation: {turn.content!r}"))
    return turn, next(iter(tools.values())) if len(tools) == 1 else None
