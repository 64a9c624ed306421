"""A chat's first turn is written as training wrote its rows, whatever they were written with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import config, pipeline
from luthier.tuned import Tuned

TEMPLATES: dict[str, dict[str, Any]] = {
    "all inputs": {"template": "Task: {__sample__}\n"},
    "a task": {"template": "{__task__}: {__sample__}\n", "task": "Answer"},
    "a template in a chat": {"template": "Q: {question} !", "chat_template": True},
    "a task in a chat": {"template": "{__task__}: {__sample__}", "task": "Answer", "chat_template": True},
    "columns in a chat": {"chat_template": True},
}


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Callable[..., Tuned]:
    def train(prompt: dict[str, Any], names: tuple[str, ...], rows: list[dict[str, Any]]) -> Tuned:
        settings = {
            "base_model": str(tiny_llama),
            "adapter": {"type": "lora", "r": 2},
            "prompt": prompt,
            "input_features": [{"name": name} for name in names],
            "output_features": [{"name": "answer", "type": "text"}],
            "generation": {"max_new_tokens": 2},
            "trainer": {"train_steps": 1, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0},
        }
        return pipeline.train(config.load(settings), rows, output=tmp_path / "run").tuned

    return train


def asked(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model is given from now on, as text."""
    seen: list[str] = []
    whole = Tuned.reply

    def reply(self: Tuned, row: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        seen.append(self.tokenizer.decode(list(ids)))
        return whole(self, row, ids, *rest, **named)

    monkeypatch.setattr(Tuned, "reply", reply)
    return seen


def of_row(tuned: Tuned, row: dict[str, Any]) -> str:
    return tuned.tokenizer.decode(list(tuned.renderer.prompt(row).ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_turn_is_what_predict_asks(
    name: str, made: Callable[..., Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"say {i}", "answer": str(i), "split": i % 3} for i in range(12)]
    tuned = made(TEMPLATES[name], ("question",), rows)
    seen, talk = asked(tuned, monkeypatch), tuned.chat()
    assert talk.column == "question" and talk.others == {}
    list(talk.say("hello"))
    assert seen == [of_row(tuned, {"question": "hello"})] and "hello" in seen[0]
    list(talk.say("and on"))
    if talk.is_chat:  # a later turn is as it was said, after what was asked before
        assert talk.messages[2].content == "and on"
        assert seen[0].strip() in seen[1]
    else:
        assert seen[1] == of_row(tuned, {"question": "and on"})
    talk.reset()
    list(talk.say("hello"))
    assert seen[2] == seen[0]


def test_columns_beside_the_message_stand_in_the_first_turn(
    made: Callable[..., Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"how": "Say it.", "what": f"word {i}", "answer": str(i), "split": i % 3} for i in range(12)]
    tuned = made({"chat_template": True}, ("how", "what"), rows)
    seen, talk = asked(tuned, monkeypatch), tuned.chat(system="Be brief.")
    assert (talk.column, talk.others) == ("what", {"how": "Say it."})
    list(talk.say("hello"))
    assert "Be brief." in seen[0] and talk.messages[1].content == tuned.renderer.question(
        {"how": "Say it.", "what": "hello"}
    )
    assert "Say it." in talk.messages[1].content
