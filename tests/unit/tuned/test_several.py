"""Several answers a row, their log-probabilities and tokens named by text, from the config to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from luthier import config, pipeline
from luthier.errors import ConfigError
from luthier.tuned.bulk import predict_into

ROWS = pd.DataFrame({"text": ["one", "two", "three"]})


@pytest.fixture(scope="module")
def asked(tiny_llama: Path) -> Any:
    generation = {"max_new_tokens": 6, "min_new_tokens": 6, "temperature": 1.0, "n": 3, "logprobs": True}
    made = {"base_model": str(tiny_llama), "prompt": {"template": "{text}"}, "generation": generation}
    return pipeline.untuned(config.load(made))


def test_predictions_hold_all_answers_in_ludwigs_shape(asked: Any, tmp_path: Path) -> None:
    answered = asked.predict(ROWS)
    frame = answered.ludwig_frame()
    assert all(len(each) == 3 for each in frame["output_response"])
    assert [each[0] for each in frame["output_response"]] == list(frame["output_predictions"])
    assert answered.texts == asked.predict(ROWS, generation={"n": 1}).texts
    records = answered.records()
    assert all(len(r["responses"]) == 3 and len(r["logprobs"]) == len(r["warped_logprobs"]) == 6 for r in records)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        path = predict_into(tmp_path / name, asked, ROWS).path
        if name == "a.jsonl":
            read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif name == "a.parquet":
            read = pd.read_parquet(path).to_dict("records")
        else:
            cells = pd.read_csv(path, keep_default_na=False).to_dict("records")
            lists = ("responses", "logprobs", "warped_logprobs")
            read = [{k: json.loads(v) if k in lists else v for k, v in cell.items()} for cell in cells]
        for got, want in zip(read, records, strict=True):
            assert list(got["responses"]) == want["responses"]
            assert list(got["logprobs"]) == pytest.approx(want["logprobs"], abs=1e-5)


def test_texts_and_streams(asked: Any) -> None:
    flat = asked.generate(["a", "b"])
    assert len(flat) == 6
    pieces = ["", "", ""]
    for number, piece in asked.stream_several("a"):
        pieces[number] += piece
    assert pieces == flat[:3]
    assert "".join(asked.stream("a")) == flat[0]


def test_words_that_are_not_one_token_are_refused_before_anything_runs(asked: Any) -> None:
    with pytest.raises(ConfigError, match="2 tokens"):
        asked.predict(ROWS, generation={"logit_bias": {"ab": 1.0}})
    only = asked.generate(["a"], {"n": 1, "logit_bias": {"x": 100.0}, "temperature": 0})
    assert only == ["xxxxxx"]
    assert "x" not in asked.generate(["a"], {"n": 1, "logit_bias": {"x": 90.0, "y": 80.0}, "bad_words": ["x"]})[0]


def test_the_python_interface(tiny_llama: Path) -> None:
    from luthier import Model

    made = {"base_model": str(tiny_llama), "generation": {"max_new_tokens": 5, "temperature": 1.0, "min_new_tokens": 5}}
    model = Model(made, quiet=True)
    flat = model.generate(["a", "b"], n=2)
    assert len(flat) == 4 and model.generate("a", n=1) == flat[0]
    pieces = ["", ""]
    for number, piece in model.stream_several("a", n=2):
        pieces[number] += piece
    assert pieces == flat[:2]
    with pytest.raises(ConfigError, match="in a list"):
        model.generate("a", n=2)
