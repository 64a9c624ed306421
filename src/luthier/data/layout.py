"""The roles of a table's columns, as the rest of the data's code is told them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["instruction", "completion", "chat", "text", "columns"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The roles of a table's columns.

    kind          inputs                          target
    instruction   instruction [, input]           output (the names as the table spells them)
    completion    prompt (or question)            completion (or answer)
    columns       the chosen or guessed columns   the chosen or guessed column
    text          none                            the column of running text
    chat          none, or a column with the      the column with the conversation, or with its answer turns
                  opening messages
    """

    kind: Kind
    inputs: tuple[str, ...]
    target: str | None  # None only when nothing is learned (prediction)
    is_guess: bool = False  # nobody said so and no known convention matched
    classes: tuple[str, ...] | None = None  # the allowed answers, when the target is a class
    explanation: tuple[str, ...] = ()  # one line each, for people
    system: str | None = None  # a column with a system prompt for the row
    tools: str | None = None  # a column with the tools that a conversation may call
