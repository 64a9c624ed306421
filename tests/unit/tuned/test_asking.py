"""Texts asked from Python: each is answered, or an error says which is not and why; none is '' without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import Model, config, pipeline
from luthier.api import LudwigModel
from luthier.errors import ConfigError, DataError
from luthier.infer.engine import DecoderEngine
from luthier.infer.generate import HfEngine

LONG = "w" * 600  # tokens are bytes, and the context has 512


@pytest.fixture(scope="module", params=["luthier", "transformers"])
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> Model:
    generation = {"engine": request.param, "max_new_tokens": 4, "min_new_tokens": 4}
    return Model.of(pipeline.untuned(config.load({"base_model": str(tiny_llama), "generation": generation})))


def ludwig(model: Model) -> LudwigModel:
    made = LudwigModel.__new__(LudwigModel)
    made._model = model
    return made


ONE: dict[str, Callable[[Model, str, dict[str, Any]], Any]] = {
    "generate": lambda model, text, options: model.generate(text, **options),
    "stream": lambda model, text, options: list(model.stream(text, **options)),
    "stream_several": lambda model, text, options: list(model.stream_several(text, **options)),
    "ludwig": lambda model, text, options: ludwig(model).generate(text, options),
    "ludwig, streaming": lambda model, text, options: ludwig(model).generate(text, options, streaming=True),
}


@pytest.mark.parametrize("name", ONE)
def test_a_prompt_without_an_answer_is_an_error(model: Model, name: str) -> None:
    with pytest.raises(DataError) as caught:
        ONE[name](model, LONG, {})
    (fault,) = caught.value.faults
    assert (fault.code, fault.where, fault.received) == ("data-prompt", "prompt 0", "600 tokens")
    assert fault.allowed == "at most 511" and "context 512" in fault.message


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("wrong", [5, None, b"Dear Sir,", {"prompt": "Dear Sir,"}])
def test_what_is_no_text_is_an_error(model: Model, name: str, wrong: Any) -> None:
    with pytest.raises(DataError) as caught:
        ONE[name](model, wrong, {})
    (fault,) = caught.value.faults
    assert fault.code == "data-prompt" and fault.where in ("prompts", "prompt 0")
    assert fault.received == ("None" if wrong is None else wrong) and fault.allowed == "a text, or a list of texts"


def test_prompts_that_are_no_texts_are_told_by_their_numbers(model: Model) -> None:
    with pytest.raises(DataError) as caught:
        model.generate(["Dear Sir,", 5, None])
    assert [(one.code, one.where) for one in caught.value.faults] == [
        ("data-prompt", "prompt 1"), ("data-prompt", "prompt 2")
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "count"), [("n", 2), ("num_return_sequences", 2), ("n", "2")])
def test_a_prompt_that_is_no_list_gets_one_answer(model: Model, key: str, count: Any) -> None:
    with pytest.raises(ConfigError, match="gets one answer") as caught:
        model.generate("Dear Sir,", temperature=1.0, **{key: count})
    assert caught.value.faults[0].where == key


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize(
    ("options", "code", "key", "received"),
    [
        ({"max_length": 1}, "config-conflict", "prompt 0, generation.max_length", 1),
        ({"logit_bias": {"99999": 1}}, "config-bad-value", "generation.logit_bias", 99999),
        ({"forced_bos_token_id": 99999}, "config-bad-value", "generation.forced_bos_token_id", 99999),
        ({"typical_p": 2.0}, "config-bad-value", "generation_config typical_p", 2.0),
    ],
)
def test_a_setting_that_leaves_no_answer_is_an_error(
    model: Model, name: str, options: dict[str, Any], code: str, key: str, received: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        ONE[name](model, "hi", options)
    (fault,) = caught.value.faults
    assert (fault.code, fault.where, fault.received) == (code, key, received)
    assert fault.allowed


def test_all_of_several_are_told_before_anything_is_generated(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = model.generate(["hi", "ho"])
    assert ludwig(model).generate(["hi", "ho"]) == good and all(good)
    asked = []
    for engine in (DecoderEngine, HfEngine):
        monkeypatch.setattr(engine, "generate", lambda self, requests: asked.append(requests) or iter(()))
    for ask in (model.generate, ludwig(model).generate):
        with pytest.raises(DataError) as caught:
            ask([LONG, "hi", LONG[:512], "ho"])
        assert [fault.where for fault in caught.value.faults] == ["prompt 0", "prompt 2"]
    assert not asked


def test_an_answer_that_memory_does_not_hold_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (DecoderEngine, HfEngine):
        run = engine.generate

        def second_fails(self: Any, requests: Any, run: Any = run) -> Any:
            for done in run(self, requests):
                lost = replace(done.others[0], finish_reason="error", error="out of memory") if done.key else None
                yield replace(done, others=(lost,)) if lost else done

        monkeypatch.setattr(engine, "generate", second_fails)
    with pytest.raises(DataError, match="out of memory") as caught:
        model.generate(["hi", "ho"], n=2, temperature=1.0)
    assert caught.value.faults[0].where == "prompt 1"
