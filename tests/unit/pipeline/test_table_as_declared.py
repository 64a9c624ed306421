"""What a config says of a table: an input that names the prompt, as Ludwig's first example has it, and a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from luthier import events, pipeline
from luthier.api import LudwigModel
from luthier.config import load
from luthier.errors import ConfigError, DataError, Interrupted
from luthier.pipeline.reading import read_table

WORDS = ("apple", "river", "stone", "candle", "window", "garden", "mirror", "ladder", "pepper", "saddle")


@pytest.fixture
def alpaca() -> list[dict[str, Any]]:
    """40 rows of the columns of Ludwig's example."""
    return [
        {"instruction": "Say it.", "input": f"{word} {i}", "output": f"{word}!"} for i in range(4) for word in WORDS
    ]


@pytest.fixture
def readme(tiny_llama: Path) -> dict[str, Any]:
    """Ludwig's first example of a language model, on the tiny one."""
    return {
        "model_type": "llm",
        "base_model": str(tiny_llama),
        "adapter": {"type": "lora"},
        "prompt": {"template": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"},
        "input_features": [{"name": "prompt", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "generation": {"max_new_tokens": 3},
        "trainer": {"type": "finetune", "train_steps": 1, "batch_size": 4, "precision": "fp32"},
    }


def test_an_input_that_is_no_column_names_the_prompt_of_the_template(readme, alpaca, tmp_path: Path) -> None:
    heard: list[Any] = []
    settings = load(readme)
    work = pipeline.check(settings, alpaca, sink=heard.append)
    told = [one.text for one in heard if isinstance(one, events.Note)]
    assert "'prompt' is no column but the prompt, which prompt.template makes of instruction, input" in told
    assert (work.layout.inputs, work.layout.target) == (("instruction", "input"), "output")
    plain = {**readme, "input_features": [{"name": "instruction"}, {"name": "input"}]}
    same = pipeline.check(load(plain), alpaca)
    assert [one.ids for one in work.prepared.examples["train"]] == [one.ids for one in same.prepared.examples["train"]]

    trained = pipeline.train(settings, alpaca, output=tmp_path / "run")
    assert pipeline.train(settings, alpaca, output=tmp_path / "run").standing == "finished"
    tuned = pipeline.load(tmp_path / "run", dataset=alpaca)
    asked = [{"instruction": "Say it.", "input": "river"}]
    assert tuned.predict(asked).texts == trained.tuned.predict(asked).texts
    assert len(tuned.evaluate(alpaca[:3], shots=0).contestants) >= 2
    assert list(tuned.chat().say("river")) and "input" in {tuned.chat().column, *tuned.chat().others}
    with pytest.raises(DataError, match="no column 'input'"):
        tuned.predict([{"instruction": "Say it.", "prompt": "river"}])


def test_ludwig_model_takes_the_example_and_a_sample_of_it(readme, alpaca, tmp_path: Path) -> None:
    model = LudwigModel({**readme, "preprocessing": {"sample_ratio": 0.5}})
    frame = pd.DataFrame(alpaca)
    stats, _, data, _ = model.experiment(frame, output_directory=str(tmp_path))
    assert sum(data.training_set_metadata["examples"].values()) == 20 and stats["output"]
    assert len(model.predict(frame[:2].drop(columns="output"))[0]) == 2
    assert len(model.predict(split="test")[0]) == len(data.test_set)
    with pytest.raises(DataError, match="has learned a sample of it"):
        model.predict(frame, split="test")
    base = LudwigModel({**readme, "trainer": {"type": "none"}})
    assert len(base.predict(frame[:2])[0]) == 2
    assert len(base.predict(frame[:2].drop(columns="output"))[0]) == 2


@pytest.mark.parametrize(
    ("template", "inputs", "close"),
    [
        (None, ["instrution"], "instruction"),  # no template: the input itself is asked
        ("{__sample__}\n", ["instrution"], "instruction"),
        ("{__task__}\n", ["instrution"], "instruction"),
        ("{instruction} {inptu}\n", ["prompt"], ""),
        ("{instruction}\n", ["instruction", "inptu"], "input"),  # the one of several that is no column is misspelt
    ],
)
def test_a_misspelt_column_stays_an_error(readme, alpaca, template, inputs, close) -> None:
    prompt = {"template": template} | ({"task": "Go."} if "__task__" in str(template) else {})
    settings = load({**readme, "prompt": prompt, "input_features": [{"name": name} for name in inputs]})
    with pytest.raises(DataError, match="no column") as caught:
        pipeline.check(settings, alpaca)
    assert close in caught.value.faults[0].fix


@pytest.mark.parametrize(("given", "count"), [({"sample_ratio": 0.25}, 10), ({"sample_size": 7}, 7)])
def test_a_sample_is_drawn_by_the_runs_seed_before_the_split(readme, alpaca, given, count) -> None:
    heard: list[Any] = []

    def read(seed: int) -> list[dict[str, Any]]:
        settings = load({**readme, "preprocessing": given, "random_seed": seed})
        return list(read_table(settings, alpaca, encoding=None, sink=heard.append))

    first = read(1)
    assert len(first) == count and first == read(1) != read(2)
    assert first == [row for row in alpaca if row in first]  # in the table's order
    told = f"a random sample of {count} of 40 rows is used, and rows are numbered within it"
    assert told in [one.text for one in heard if isinstance(one, events.Note)]


def test_all_rows_are_used_where_the_sample_is_as_large(readme, alpaca) -> None:
    heard: list[Any] = []
    settings = load({**readme, "preprocessing": {"sample_size": 100}})
    assert len(read_table(settings, alpaca, encoding=None, sink=heard.append)) == 40
    assert any("40 rows: all are used" in getattr(one, "text", "") for one in heard)
    with pytest.raises(DataError, match=r"no row .* is left after sampling"):
        read_table(load({**readme, "preprocessing": {"sample_ratio": 0.01}}), alpaca, encoding=None, sink=heard.append)


@pytest.mark.parametrize("given", [{"sample_ratio": 0}, {"sample_ratio": 1.5}, {"sample_ratio": True},
                                   {"sample_size": 0}, {"sample_ratio": 0.5, "sample_size": 3}])  # fmt: skip
def test_samples_that_cannot_be_are_refused(readme, given) -> None:
    with pytest.raises(ConfigError, match="sample"):
        load({**readme, "preprocessing": given})


def test_a_run_on_a_sample_goes_on_and_evaluates_on_what_it_held_out(readme, alpaca, tmp_path, monkeypatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, alpaca)))
    trainer = {**readme["trainer"], "train_steps": 2, "steps_per_checkpoint": 1}
    settings = load({**readme, "trainer": trainer, "preprocessing": {"sample_ratio": 0.5}})

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("luthier.pipeline.training.report", ended)
        pipeline.train(settings, data, output=tmp_path / "run")
    trained = pipeline.train(settings, data, output=tmp_path / "run")
    assert trained.standing == "resumed" and sum(trained.rows.values()) == 20
    lock = json.loads((tmp_path / "run" / "run.json").read_text())["lock"]
    assert lock["config"]["preprocessing"]["sample_ratio"] == 0.5
    table, splits = pipeline.load(tmp_path / "run").training_table()
    assert len(table) == len(splits) == 20 and sum(side == 2 for side in splits) == trained.rows["test"]
