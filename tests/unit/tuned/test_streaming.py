"""Streams show whole characters only, whichever engine answers and however many tokens a character takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import config, pipeline

TEXTS = ["naïve", "日本語のテキスト", "🙂👍🏽!", "👨‍👩‍👧 é\u0301 end", "Ωmega → 𝔘"]


@pytest.fixture(scope="module", params=["luthier", "transformers"])
def asked(request: pytest.FixtureRequest, tiny_llama: Path) -> Any:
    """A model whose tokens are bytes: an emoji takes four."""
    generation = {"engine": request.param, "max_new_tokens": 60}
    made = {"base_model": str(tiny_llama), "prompt": {"template": "{text}"}, "generation": generation}
    return pipeline.untuned(config.load(made))


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_of_a_character_is_shown(asked: Any, text: str) -> None:
    pytest.importorskip("llguidance")
    pieces = list(asked.stream("say", {"choices": [text]}))
    assert "".join(pieces) == text
    assert len(pieces) == len(text) and "\ufffd" not in "".join(pieces)


def test_a_stop_string_of_several_bytes_is_never_shown(asked: Any) -> None:
    pytest.importorskip("llguidance")
    pieces = list(asked.stream("say", {"choices": ["ab🙂🙃cd"], "stop": ["🙃c"]}))
    assert "".join(pieces) == "ab🙂"


def test_several_streams_side_by_side_keep_their_characters_apart(asked: Any) -> None:
    pytest.importorskip("llguidance")
    options = {"choices": TEXTS, "temperature": 1.0, "n": 4, "seed": 3}
    shown: dict[int, list[str]] = {}
    for number, piece in asked.stream_several("say", options):
        shown.setdefault(number, []).append(piece)
    whole = ["".join(shown[number]) for number in range(4)]
    assert set(whole) <= set(TEXTS) and len(set(whole)) > 1
    assert all(len(pieces) == len("".join(pieces)) for pieces in shown.values())
    assert whole == asked.generate(["say"], options)


def test_chat_streams_whole_characters_and_remembers_the_system_prompt(tiny_llama: Path) -> None:
    pytest.importorskip("llguidance")
    made = {"base_model": str(tiny_llama), "prompt": {"chat_template": "auto"}, "generation": {"max_new_tokens": 40}}
    conversation = pipeline.untuned(config.load(made)).chat(system="Be brief.")
    for turn in ("one", "two"):
        pieces = list(conversation.say(turn, generation={"choices": ["🙂 ja"]}))
        assert pieces == ["🙂", " ", "j", "a"]
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2].content == "🙂 ja"
