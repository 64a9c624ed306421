"""vLLM itself, where it is installed: what it answers is what Luthier's own engine answers, on the embedded model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from luthier import config, pipeline
from luthier.errors import ConfigError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # its own
]
TABLE = Path(__file__).parents[2] / "examples/dictionary/dictionary.csv"
SETTINGS: dict[str, Any] = {
    "base_model": "smollm2", "prompt": {"template": "{instruction}\n{input}\n"},
    # Each layer's own scale, which versions before 0.32 lose.
    "adapter": {"type": "lora", "r": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8},
                "postprocessor": {"merge_adapter_into_base_model": True}},
    "trainer": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3, "precision": "fp32"},
    "preprocessing": {"split": {"type": "fixed"}}, "generation": {"max_new_tokens": 24},
}  # fmt: skip
WORDS = {"regex": "(small|large) [a-z]{3,9}\\.", "choices": ["a plant", "an animal", "a tool"]}
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["word", "sense"],
    "properties": {"word": {"type": "string", "maxLength": 12}, "sense": {"enum": ["noun", "verb"]}},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_cache() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read at the start, on a CPU only


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    table = pd.read_csv(TABLE)
    return table[table.split == 2].head(12)[["instruction", "input"]].reset_index(drop=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps: enough that the adapter answers otherwise than its base."""
    table = pd.read_csv(TABLE)
    folder = tmp_path_factory.mktemp("vllm") / "run"
    pipeline.train(config.load(SETTINGS), pd.concat([table[table.split == n].head(64) for n in (0, 1)]), output=folder)
    return folder


def opened(run: Path, engine: str) -> Any:
    return pipeline.load(run, overrides=[f"generation.engine={engine}"])


@pytest.fixture(scope="module")
def both(run: Path) -> tuple[Any, Any]:
    """Luthier's own engine and vLLM, with the same adapter."""
    return opened(run, "luthier"), opened(run, "vllm")


def answers(asked: Any, rows: Any, **how: Any) -> list[tuple[tuple[int, ...], str, str]]:
    done = sorted(asked.predict(rows, **how).completions, key=lambda one: one.key)
    return [(one.ids, one.text, one.finish_reason) for one in done]


def test_the_adapter_and_its_base_answer_the_same_tokens(both: tuple[Any, Any], rows: pd.DataFrame) -> None:
    ours, theirs = both
    tuned = answers(theirs, rows)
    assert tuned == answers(ours, rows)
    base = answers(theirs, rows, use_base=True)
    assert base == answers(ours, rows, use_base=True)
    assert tuned != base and {reason for *_, reason in tuned + base} == {"stop", "length"}


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"frequency_penalty": -1.0},
        {"logit_bias": {" the": -100, ".": 4}, "repetition_penalty": 1.2}, {"min_new_tokens": 20},
        {"stop": ["]", " a "]}, {"stop": ["."], "min_new_tokens": 12}, {"max_new_tokens": 1}, {"max_length": 40},
        # Words of several tokens, and of one after a space.
        {"bad_words": ["the", "n.", "legally", "manner", "pencil", "mashed"]}, {"bad_words_ids": [[304, 30], [30, 2]]},
        {"choices": WORDS["choices"]}, {"regex": WORDS["regex"]}, {"schema": SCHEMA, "max_new_tokens": 64},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_settings_mean_the_same(both: tuple[Any, Any], rows: pd.DataFrame, settings: dict[str, Any]) -> None:
    ours, theirs = both
    assert answers(theirs, rows, generation=settings) == answers(ours, rows, generation=settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 6}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.7}, {"temperature": 1.2, "top_k": 9, "min_p": 0.15},
        {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5, "logit_bias": {"198": 2.0}},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_draws_have_the_same_distribution(both: tuple[Any, Any], rows: pd.DataFrame, settings: dict[str, Any]) -> None:
    """First tokens of 512 answers: none that may not be drawn, and as often as they should be."""
    ours, theirs = both
    how = settings | {"max_new_tokens": 1, "n": 128, "seed": 5}
    four = pd.concat([rows.head(1)] * 4, ignore_index=True)
    told = ours.predict(four, generation=how | {"logprobs": True}).completions
    chance = {one.ids[0]: math.exp(one.warped_logprobs[0]) for done in told for one in (done, *done.others)}
    answered = theirs.predict(four, generation=how).completions
    drawn = Counter(one.ids[0] for done in answered for one in (done, *done.others))
    total = sum(drawn.values())
    assert total == 512
    # Ours may have missed what is rare.
    assert sum(count for token, count in drawn.items() if token not in chance) <= 0.01 * total
    often = {token: share for token, share in chance.items() if share * total >= 5}
    square = sum((drawn[token] - total * share) ** 2 / (total * share) for token, share in often.items())
    freedom = len(often)
    assert square < freedom + 5 * math.sqrt(2 * freedom), (square, freedom, often, drawn)


def test_a_seed_draws_the_same_answer_whatever_is_asked_beside_it(both: tuple[Any, Any], rows: pd.DataFrame) -> None:
    _, theirs = both
    how = {"temperature": 1.0, "seed": 3}
    several = min(theirs.predict(rows.head(4), generation=how | {"n": 2}).completions, key=lambda one: one.key)
    alone = answers(theirs, rows.head(1), generation=how)
    assert alone == [(several.ids, several.text, several.finish_reason)]
    assert several.ids != several.others[0].ids
    assert answers(theirs, rows.head(1), generation=how | {"seed": 4}) != alone


def test_rows_that_cannot_be_answered_do_not_stop_the_others(both: tuple[Any, Any]) -> None:
    _, theirs = both
    table = pd.DataFrame({"instruction": ["Typeset the entry.", "long"], "input": ["oak", "word " * 9000]})
    short, long = sorted(theirs.predict(table).completions, key=lambda one: one.key)
    assert short.text and "context" in str(long.error)


def test_what_it_refuses_is_told(both: tuple[Any, Any], rows: pd.DataFrame) -> None:
    _, theirs = both
    with pytest.raises(ConfigError, match="vLLM cannot honour logprobs"):
        theirs.predict(rows, generation={"logprobs": True})
    with pytest.raises(ConfigError, match="temperature"):
        theirs.predict(rows, generation={"temperature": 3.0})


def test_a_stream_arrives(both: tuple[Any, Any]) -> None:
    _, theirs = both
    assert "".join(theirs.stream("Typeset the entry.\noak\n"))


def test_merged_weights_answer_the_same_tokens(run: Path, rows: pd.DataFrame) -> None:
    """The merged ones are rounded to the base's bf16, so they need not answer as the adapter does."""
    made = {"base_model": str(run / "merged"), "prompt": SETTINGS["prompt"], "trainer": {"precision": "fp32"}}
    ours, theirs = (
        pipeline.untuned(config.load(made | {"generation": SETTINGS["generation"] | {"engine": engine}}))
        for engine in ("luthier", "vllm")
    )
    assert answers(theirs, rows) == answers(ours, rows)


def test_predict_writes_nothing_but_answers(run: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    rows.head(2).to_csv(tmp_path / "rows.csv", index=False)
    luthier = [sys.executable, "-c", "from luthier.cli import main; main()", "predict"]
    asked = [str(run), "--dataset", str(tmp_path / "rows.csv"), "--set", "generation.engine=vllm", "--json"]
    done = subprocess.run([*luthier, *asked], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert len(told["answers"]) == 2 and all(answer["response"] for answer in told["answers"]), told
