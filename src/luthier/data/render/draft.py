"""What a row becomes on its way to token ids, and what is said of rows that do not arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.data.render.template import Rendered
from luthier.types import Example

TASK = "{__task__}\n{__sample__}\n"  # the template of a task that is given without one
Truncation = Literal["drop", "truncate_prompt", "truncate_target", "error"]


@dataclass(frozen=True, slots=True)
class Draft:
    """One prompt and the text that is to follow it, before tokenisation."""

    prompt: Rendered
    target: Rendered
    turn: int = 0
    from_chat: bool = False  # a chat template wrote both: it writes BOS and ends the turn itself
    guarded: bool = False  # the data spells, or could spell, a special token
    control: bool = False  # the data spells a whole special token


@dataclass(frozen=True, slots=True)
class PromptIds:
    """What the model is given before it answers: the ids, and the text that they are of."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not trained on, and why. ``reason``: no target, nothing precedes the answer, too long."""

    reason: str
    row: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that became of one row."""

    row: int
    examples: tuple[Example, ...] = ()
    dropped: Dropped | None = None
    missing: tuple[str, ...] = ()  # prompt columns without a value
    unread: tuple[str, ...] = ()  # keys of its turns that nothing reads
    unprompted: bool = False  # its conversation opens with an answer, which is not trained
    control: bool = False
    cut: tuple[str, ...] = ()  # truncate_prompt and/or truncate_target, when one was applied to an example
    lost_turns: int = 0  # answers of a conversation that were too long, where others were kept
    answers: int = 0  # answers that are trained
    ended: int = 0  # those of them whose end-of-turn token is trained too


@dataclass(frozen=True, slots=True)
class Settings:
    """What rendering reads of the config, in one place."""

    template: str | None = None
    task: str | None = None
    system: str | None = None
    chat_template: str | bool | None = None
    train_on: str = "completion"
    max_length: int | None = None
    truncation: Truncation = "truncate_prompt"

    @classmethod
    def of(cls, prompt: Any, preprocessing: Any, limit: int | None = None) -> Settings:
        """From the sections ``prompt`` and ``preprocessing`` (None: defaults). ``limit``: the model's context."""
        lengths = [getattr(preprocessing, key, None) for key in ("max_sequence_length", "global_max_sequence_length")]
        known = [n for n in (*lengths, limit) if n]
        template, task = getattr(prompt, "template", None), getattr(prompt, "task", None)
        return cls(
            template=TASK if task and template is None else template,
            task=task,
            system=getattr(prompt, "system", None),
            chat_template=getattr(prompt, "chat_template", None),
            train_on=getattr(prompt, "train_on", None) or "completion",
            max_length=min(known) if known else None,
            truncation=getattr(preprocessing, "truncation", None) or "truncate_prompt",
        )


def merge(examples: Sequence[Example]) -> list[Example]:
    """Join answers of one conversation where an earlier example is exactly how a later one begins.

    The ids stay those that prediction sees; the later example trains both answers, and the prefix is computed once.
    """
    out: list[Example] = []
    for example in examples:
        last = out[-1] if out else None
        if last is None or tuple(example.ids[: last.length]) != tuple(last.ids):
            out.append(example)
            continue
        weights = tuple(max(a, b) for a, b in zip(last.weights, example.weights, strict=False))
        out[-1] = Example(example.ids, weights + tuple(example.weights[last.length :]), example.row, last.turn)
    return out
