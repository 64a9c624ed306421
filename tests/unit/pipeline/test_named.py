"""Metrics and layers that a config names are looked for before a weight is loaded."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from luthier import config, pipeline
from luthier.errors import AssetError, ConfigError
from luthier.events import Saved
from luthier.pipeline import named

TEXT = [{"name": "label", "type": "text"}]


@pytest.mark.parametrize(
    ("features", "trainer", "where", "there"),
    [
        (TEXT, {"validation_metric": "accuracy"}, "trainer.validation_metric", "exact_match"),
        (None, {"validation_metric": "exact_match"}, "trainer.validation_metric", "macro_f1"),
        (None, {"validation_metric": "accuracy", "eval_generation_rows": 0}, "trainer.validation_metric", "loss"),
        (None, {"validation_metric": "supervised_tokens"}, "trainer.validation_metric", "perplexity"),
        (None, {"validation_metric": "tokens_per_s"}, "trainer.validation_metric", "perplexity"),
        (
            None,
            {
                "evaluate_training_set": True,
                "learning_rate_scheduler": {
                    "reduce_on_plateau": 1,
                    "reduce_eval_metric": "supervised_tokens",
                    "reduce_eval_split": "training",
                },
            },
            "trainer.learning_rate_scheduler.reduce_eval_metric",
            "perplexity",
        ),
        (
            None,
            {"learning_rate_scheduler": {"reduce_on_plateau": 1, "reduce_eval_metric": "los"}},
            "trainer.learning_rate_scheduler.reduce_eval_metric",
            "loss",
        ),
        (
            None,
            {
                "learning_rate_scheduler": {
                    "reduce_on_plateau": 1,
                    "reduce_eval_metric": "perplexity",
                    "reduce_eval_split": "training",
                }
            },
            "trainer.learning_rate_scheduler.reduce_eval_metric",
            "loss",
        ),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_training(
    settings, rows, features: Any, trainer: dict[str, Any], where: str, there: str
) -> None:
    settings["trainer"] |= {"eval_generation_rows": 4} | trainer
    made = config.load(settings | ({"output_features": features} if features else {}))
    with pytest.raises(ConfigError) as caught:
        pipeline.check(made, rows)
    (fault,) = caught.value.faults
    assert fault.code == "config-bad-value" and fault.where == where and there in (fault.allowed or ())
    assert "supervised_tokens" not in (fault.allowed or ())


def test_a_metric_of_the_target_decides(settings, rows, train) -> None:
    made = train("classes", trainer__validation_metric="accuracy", trainer__eval_generation_rows=4)
    assert made.to_json()["best"]["metric"] == "accuracy"
    settings["trainer"]["validation_metric"] = "token_accuracy"
    pipeline.check(config.load(settings | {"output_features": TEXT}), rows)


@pytest.mark.parametrize(("adapter", "what"), [(None, "weights"), ({"type": "lora", "r": 2}, "adapter")])
def test_what_was_saved_is_called_by_its_name_and_the_result_is_shown_short(train, adapter: Any, what: str) -> None:
    saved: list[Saved] = []
    made = train("saved", adapter=adapter, sink=lambda event: saved.append(event) if isinstance(event, Saved) else None)
    assert [one.what for one in saved if one.what != "checkpoint"] == [what]
    assert len(repr(made)) < 300 and str(made.folder) in repr(made)


def test_what_is_called_measured_is_what_an_evaluation_gives(train) -> None:
    """The names are written down apart from torch."""
    told = set(train("measured").history["validation"])  # no answer is generated here
    assert told - {"tokens_per_s", "learning_rate", "memory_gib"} == set(named.MEASURED)


@pytest.mark.parametrize(
    ("adapter", "wrong"),
    [
        ({"target_modules": ["nope"]}, "nope"),
        ({"target_modules": ["q_proj", "norm"]}, "norm"),  # no adapter can stand there
        ({"target_modules": r".*\.(c_attn|qkv)"}, r".*\.(c_attn|qkv)"),
        ({"type": "loha", "target_modules": ["q_proj", "w_proj"]}, "w_proj"),
    ],
)
def test_layers_that_the_base_has_not_are_refused_before_it_is_loaded(
    settings, rows, adapter: dict[str, Any], wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr("luthier.pipeline.fitting.open_for_tuning", Mock(side_effect=AssertionError("it was loaded")))
    made = config.load(settings | {"adapter": {"type": "lora"} | adapter})
    for ask in (pipeline.check, lambda one, data: pipeline.train(one, data, output=tmp_path / "run")):
        with pytest.raises(AssetError) as caught:
            ask(made, rows)
        (fault,) = caught.value.faults
        assert (fault.code, fault.where, fault.received) == ("asset-unsupported", "adapter.target_modules", wrong)
        assert "q_proj" in (fault.allowed or ())


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]},
        {"target_modules": r".*\.(q_proj|v_proj|query_key_value|c_attn|qkv_proj|Wqkv)"},
        {"target_modules": "all-linear"},
        {"type": "ln_tuning", "target_modules": ["input_layernorm"]},
        {"target_modules": ["q_proj", "lm_head"]},  # through PEFT, as the next two
        {"target_modules": ["embed_tokens"]},
        {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_layers_that_the_base_has_are_found(settings, rows, adapter: dict[str, Any]) -> None:
    pipeline.check(config.load(settings | {"adapter": {"type": "lora"} | adapter}), rows)


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens"])
def test_an_adapter_beside_the_layers_runs_through_peft_and_merges(
    place: str, train, rows, recwarn: pytest.WarningsRecorder
) -> None:
    """The tiny base's head is its table of embeddings: each keeps what was learned for it alone."""
    from transformers import AutoModelForCausalLM

    adapter = {"type": "lora", "r": 4, "target_modules": ["q_proj", place],
               "postprocessor": {"merge_adapter_into_base_model": True}}  # fmt: skip
    made = train("beside", adapter=adapter)
    plan = json.loads((made.folder / "plan.json").read_text())
    assert plan["model"] == "generic" and f"beside {place}" in plan["reasons"]["model"]
    assert not [one for one in recwarn if "tie_word_embeddings" in str(one.message)]
    merged = AutoModelForCausalLM.from_pretrained(made.folder / "merged").float()
    tuned = pipeline.load(made.folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, tuned.model.module(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    with pytest.raises(ConfigError, match=f"beside {place}"):
        train("pinned", adapter=adapter, execution__model="decoder")
