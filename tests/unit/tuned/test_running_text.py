"""A model that learned running text goes on from a text: nothing in its rows asks anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import config, pipeline
from luthier.errors import DataError
from luthier.tuned import Tuned

ROWS = [{"text": f"The sea number {i} was calm and the sky was clear."} for i in range(12)]


@pytest.fixture
def tuned(tiny_llama: Path, tmp_path: Path) -> Tuned:
    settings = {
        "base_model": str(tiny_llama),
        "adapter": {"type": "lora", "r": 2},
        "generation": {"max_new_tokens": 3},
        "trainer": {"train_steps": 1, "batch_size": 4, "precision": "fp32"},
    }
    return pipeline.train(config.load(settings), ROWS, output=tmp_path / "run").tuned


def test_a_prediction_begins_as_training_did(tuned: Tuned) -> None:
    row = {"text": "The sea number 3 was"}
    asked = tuned.renderer.prompt(row)
    (example,) = tuned.renderer.examples({"text": row["text"] + " calm and the sky was clear."}, 0)
    assert asked.ids == tuple(example.ids[: len(asked.ids)])
    assert asked.text == row["text"]
    (learned,) = tuned.renderer.examples(row, 0)
    assert asked.ids == tuple(learned.ids[:-1])  # all but its end


def test_an_empty_text_begins_as_training_did(tuned: Tuned) -> None:
    (example,) = tuned.renderer.examples(ROWS[0], 0)
    assert tuned.renderer.prompt({"text": ""}).ids == (example.ids[0],)


def test_a_table_without_the_text_is_refused(tuned: Tuned) -> None:
    with pytest.raises(DataError) as caught:
        tuned.predict([{"prompt": "The sea"}])
    assert caught.value.code == "data-missing-column"


def test_chat_asks_what_predict_asks(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    whole: Callable[..., Any] = Tuned.reply

    def reply(self: Tuned, row: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        seen.append(list(ids))
        return whole(self, row, ids, *rest, **named)

    monkeypatch.setattr(Tuned, "reply", reply)
    talk = tuned.chat()
    assert talk.goes_on and talk.column == "text"
    list(talk.say("The sea was"))
    list(talk.say("The sky was"))
    want = [tuned.renderer.prompt({"text": text}).ids for text in ("The sea was", "The sky was")]
    assert seen == [list(ids) for ids in want]
