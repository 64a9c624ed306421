"""Runs on conversations are asked with conversations: a table that lacks them, or what stood beside them, is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import config, events, pipeline
from luthier.errors import DataError
from luthier.tuned import Tuned

TOOLS = [{"name": "ring", "parameters": {}}]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A run on a column `conversations`, with a system prompt and tools in columns of their own."""
    settings = {
        "base_model": str(tiny_llama),
        "adapter": {"type": "lora", "r": 2},
        "generation": {"max_new_tokens": 4},
        "trainer": {"train_steps": 1, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0},
    }
    rows = [
        {"conversations": turns(f"say {i}", str(i)), "system": f"Be brief, {i}.", "tools": TOOLS, "split": i % 3}
        for i in range(12)
    ]
    return pipeline.train(config.load(settings), rows, output=tmp_path_factory.mktemp("runs") / "run").tuned


def test_a_table_without_the_conversation_is_refused_with_the_nearest_column(tuned: Tuned) -> None:
    with pytest.raises(DataError) as caught:
        tuned.predict([{"conversation": turns("say 1"), "system": "s", "tools": TOOLS}])
    fault = caught.value.faults[0]
    assert (fault.code, fault.received) == ("data-missing-column", "conversations")
    assert "'conversation'" in str(fault.fix)


def test_conversations_under_another_name_are_to_be_renamed_and_both_shapes_are_read(tuned: Tuned) -> None:
    """ShareGPT calls them `conversations`, OpenAI `messages`; what their turns look like is another matter."""
    beside = {"system": "s", "tools": TOOLS, "note": "x"}
    for ask in (tuned.predict, lambda rows: tuned.evaluate(rows, shots=0)):
        with pytest.raises(DataError) as caught:
            ask([{"messages": turns("say 1", "1"), **beside}])
        fault = caught.value.faults[0]
        assert (fault.code, fault.received) == ("data-missing-column", "conversations")
        assert fault.fix == (
            "rename 'messages', which holds conversations, to 'conversations', as the training had it "
            "(role and content, or from and value: both are read)"
        )
    shared = [{"from": "human", "value": "say 1"}]
    texts = tuned.predict([{"conversations": one, **beside} for one in (turns("say 1"), shared)]).texts
    assert texts[0] == texts[1]


def test_an_empty_conversation_is_told_in_its_row(tuned: Tuned) -> None:
    cells: list[Any] = [turns("say 1"), [], None, turns("say 2", "2")]
    answered = tuned.predict([{"conversations": one, "system": None, "tools": TOOLS} for one in cells])
    assert ["empty" in (done.error or "") for done in answered.completions] == [False, True, True, False]


def test_what_training_had_beside_the_conversation_is_missed_aloud(tuned: Tuned) -> None:
    def told(**beside: Any) -> list[str]:
        heard: list[events.Event] = []
        tuned.predict([{"conversations": turns("say 1"), **beside}], sink=heard.append)
        return [event.text for event in heard if isinstance(event, events.Warned)]

    assert told(system="Be brief.", tools=TOOLS) == []
    (system,), (tools,) = told(tools=TOOLS), told(system="Be brief.")
    assert "'system'" in system and "the system prompts" in system
    assert "'tools'" in tools and "without the tools" in tools


def trained(base: Path, folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Tuned:
    settings = {
        "base_model": str(base),
        "adapter": {"type": "lora", "r": 2},
        "generation": {"max_new_tokens": 2},
        "prompt": {"chat_template": TOLD},
        "trainer": {"train_steps": 1, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0},
    }
    return pipeline.train(config.load(settings | keys), rows, output=folder / "run").tuned


# writes the tools too
TOLD = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chatted(tuned: Tuned, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[list[int], list[str], list[str]]:
    """The ids that a first message is asked with, and what chat notes and warns of before."""
    seen: list[list[int]] = []
    heard: list[events.Event] = []

    def reply(self: Tuned, row: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        seen.append(list(ids))
        return (piece for piece in ("x",))

    with monkeypatch.context() as patch:
        patch.setattr(Tuned, "reply", reply)
        list(tuned.chat(sink=heard.append, **given).say("hello"))
    told = ([e.text for e in heard if isinstance(e, kind)] for kind in (events.Note, events.Warned))
    return (seen[0], *told)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("place", ["a column", "the first turn", "a column beside columns"])
def test_chat_asks_with_the_system_prompt_and_tools_of_all_rows_as_predict_does(
    place: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were left out without a word."""

    def row(text: str, answer: str) -> dict[str, Any]:
        if place == "a column":
            return {"messages": turns(text, answer), "system": "Be brief.", "tools": TOOLS}
        if place == "the first turn":
            return {"messages": [SYSTEM, *turns(text, answer)], "tools": TOOLS}
        return {"instruction": text, "output": answer, "system": "Be brief."}

    rows = [{**row(f"say {i}", str(i)), "split": i % 3} for i in range(12)]
    tuned = trained(tiny_llama, tmp_path, rows)
    ids, notes, warned = chatted(tuned, monkeypatch)
    assert ids == list(tuned.renderer.prompt(row("hello", "")).ids)
    assert "system: Be brief." in tuned.tokenizer.decode(ids)
    assert any("'Be brief.'" in one for one in notes) and not warned
    own = tuned.tokenizer.decode(chatted(tuned, monkeypatch, system="Be loud.")[0])
    assert "system: Be loud." in own and "brief" not in own
    assert "system" not in tuned.tokenizer.decode(chatted(tuned, monkeypatch, system="")[0])


def test_chat_says_what_differs_between_the_rows_or_is_not_known(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, (warned,) = chatted(tuned, monkeypatch)
    assert "the system prompts differ between the rows of training" in warned and "--system" in warned
    assert chatted(tuned, monkeypatch, system="Mine.")[2] == []
    assert tuned.folder is not None
    _, _, (gone,) = chatted(pipeline.load(tuned.folder), monkeypatch)
    assert "not at hand" in gone and "a system prompt" in gone and "tools" in gone
