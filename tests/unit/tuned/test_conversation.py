"""What joins the history of a conversation, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from luthier.tuned.conversation import Conversation
from luthier.types import Sampling


class Asked:
    """Stands in for `Tuned`: answers with how many turns it was shown."""

    config = SimpleNamespace(generation=None, random_seed=1)
    layout = SimpleNamespace(kind="chat", inputs=(), target=None, tools=None)
    table = None
    trained_on = SimpleNamespace(why="it was not trained")
    renderer = SimpleNamespace(
        is_chat=True, goes_on=False, chat_prompt=lambda turns, tools: SimpleNamespace(ids=[m.content for m in turns])
    )

    def sampling(self, generation: Any) -> Sampling:
        return Sampling()

    def __init__(self) -> None:
        self.made: list[bool] = []  # engines, for the base or not
        self.used: list[int] = []

    def engine(self, use_base: bool) -> int:
        self.made.append(use_base)
        return len(self.made)

    def reply(self, row: Any, ids: list[str], sampling: Any, *, use_base: bool, engine: int) -> Iterator[str]:
        self.used.append(engine)
        yield str(len(ids))
        yield " base" if use_base else ""


def test_turns_are_remembered_unless_they_are_not_to_be() -> None:
    talk = Conversation(Asked(), "Be brief.")  # type: ignore[arg-type]
    assert "".join(talk.say("a")) == "2"
    assert "".join(talk.say("b", use_base=True, remember=False)) == "4 base"
    assert "".join(talk.say("c")) == "4"
    broken_off = talk.say("d")
    next(broken_off)
    broken_off.close()  # type: ignore[attr-defined]
    assert [turn.content for turn in talk.messages] == ["Be brief.", "a", "2", "c", "4"]
    talk.reset()
    assert [turn.role for turn in talk.messages] == ["system"]


def test_turns_are_asked_of_one_engine_each_which_remembers_what_it_read() -> None:
    asked = Asked()
    talk = Conversation(asked, None)  # type: ignore[arg-type]
    for base in (False, True, False, True):
        list(talk.say("a", use_base=base))
    assert asked.made == [False, True] and asked.used == [1, 2, 1, 2]
    talk.reset()
    list(talk.say("a"))
    assert asked.used[-1] == 3  # what was read is let go of
