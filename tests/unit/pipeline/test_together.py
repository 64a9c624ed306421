"""Several runs over one base, loaded once: each answers as it does alone, and what has another base is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from luthier import pipeline
from luthier.api import Models
from luthier.errors import AssetError, ConfigError, DataError, RunError

LONG = {"max_new_tokens": 12, "min_new_tokens": 8}
PROMPTS = ["parcel 3 fast\n", "parcel 5 slow\n", "parcel"]


@pytest.fixture
def runs(train: Any, tmp_path: Path) -> list[Path]:
    """A class and a text output, adapters of different shape."""
    train("classes", trainer__epochs=2)
    text = [{"name": "label", "type": "text"}]
    adapter = {"adapter__r": 2, "adapter__target_modules": ["v_proj", "gate_proj", "down_proj"]}
    train("texts", output_features=text, trainer__epochs=6, trainer__learning_rate=3e-2, random_seed=7, **adapter)
    return [tmp_path / "classes", tmp_path / "texts"]


def test_each_answers_as_it_does_alone_and_all_share_a_batch(runs: list[Path], rows: list[dict[str, Any]]) -> None:
    models = Models.load(runs, quiet=True)
    assert list(models) == ["classes", "texts"]
    alone = {path.name: pipeline.load(path) for path in runs}
    for name, model in models.items():
        mine, theirs = model.predict(rows[30:]), alone[name].predict(rows[30:])
        assert mine.texts == theirs.texts and mine.probability == theirs.probability
        base = model.predict(rows[30:], use_base=True)
        assert base.texts == alone[name].predict(rows[30:], use_base=True).texts
        assert model.generate(PROMPTS) == alone[name].generate(PROMPTS)
    mixed = [(name, prompt) for prompt in PROMPTS for name in (*models, None)]
    answers = dict(zip(mixed, models.generate(mixed, **LONG), strict=True))
    for name, tuned in alone.items():
        assert [answers[name, prompt] for prompt in PROMPTS] == tuned.generate(PROMPTS, LONG)
    assert len({tuple(answers[name, prompt] for prompt in PROMPTS) for name in (*models, None)}) == 3
    assert models["texts"].evaluate(rows[36:], shots=0).to_json()["count"] == 4
    with pytest.raises(ConfigError, match="no such run"):
        models.generate([("letters", "x")])
    with pytest.raises(DataError) as caught:
        models.generate([(None, "x"), ("texts", "x" * 600)])
    assert caught.value.faults[0].where == "prompt 1"


def test_names_may_be_given_and_may_not_be_the_same(runs: list[Path]) -> None:
    assert list(Models.load({"one": runs[0], "two": runs[0]}, quiet=True)) == ["one", "two"]
    with pytest.raises(ConfigError, match="same name"):
        Models.load([runs[0], runs[0]], quiet=True)
    with pytest.raises(ConfigError, match="no run"):
        Models.load([], quiet=True)
    with pytest.raises(RunError, match="no such folder"):
        Models.load([runs[0], runs[0] / "nowhere"], quiet=True)


def test_another_base_is_refused(runs: list[Path], train: Any, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(tiny_llama, tmp_path / "other-base"))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(other)
    train("elsewhere", base_model=str(other))
    with pytest.raises(AssetError) as caught:
        Models.load([*runs, tmp_path / "elsewhere"], quiet=True)
    assert caught.value.code == "asset-wrong-base" and "elsewhere" in (caught.value.faults[0].where or "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": {"type": "ia3"}}, "low-rank adapters"),
        ({"adapter": None}, "low-rank adapters"),
        ({"trainer__precision": "bf16"}, "trainer.precision differs"),
    ],
)
def test_what_cannot_share_a_batch_is_refused(runs: list[Path], train: Any, changes: Any, says: str) -> None:
    made = train("odd", **changes)
    with pytest.raises((AssetError, ConfigError), match=says):
        Models.load([runs[0], made.folder], quiet=True)
