"""Ludwig's calling conventions: its signatures in its order, its result shapes; nothing given is ignored."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from luthier.api import LudwigModel, Model, TrainingStats
from luthier.errors import ConfigError, DataError

# The parameters of Ludwig's methods, in its order. Those of `train` that follow model_resume_path are asked by keyword.
LUDWIGS = {
    "__init__": "config logging_level backend gpus gpu_memory_limit allow_parallel_threads callbacks",
    "train": "dataset training_set validation_set test_set training_set_metadata data_format experiment_name "
    "model_name model_resume_path skip_save_training_description skip_save_training_statistics skip_save_model "
    "skip_save_progress skip_save_log skip_save_processed_input output_directory random_seed",
    "predict": "dataset data_format split batch_size generation_config skip_save_unprocessed_output "
    "skip_save_predictions output_directory return_type callbacks",
    "evaluate": "dataset data_format split batch_size skip_save_unprocessed_output skip_save_predictions "
    "skip_save_eval_stats collect_predictions collect_overall_stats output_directory return_type",
    "experiment": "dataset training_set validation_set test_set training_set_metadata data_format experiment_name "
    "model_name model_resume_path eval_split skip_save_training_description skip_save_training_statistics "
    "skip_save_model skip_save_progress skip_save_log skip_save_processed_input skip_save_unprocessed_output "
    "skip_save_predictions skip_save_eval_stats skip_collect_predictions skip_collect_overall_stats output_directory "
    "random_seed kwargs",
    "generate": "input_strings generation_config streaming",
    "save": "save_path",
    "load": "model_dir logging_level backend gpus gpu_memory_limit allow_parallel_threads callbacks from_checkpoint",
    "upload_to_hf_hub": "repo_id model_path repo_type private commit_message commit_description",
}


@pytest.mark.parametrize("method", LUDWIGS)
def test_signatures(method: str) -> None:
    names = [name for name in inspect.signature(getattr(LudwigModel, method)).parameters if name != "self"]
    wanted = LUDWIGS[method].split()
    assert names[: len(wanted)] == wanted


def test_train_unpacks_and_holds_one_loss_an_evaluation(trained, frame) -> None:
    _, results = trained
    stats, data, directory = results
    assert Path(directory) == Path("results/run-0") and results[2] == directory
    assert len(stats.training["output"]["loss"]) == len(stats.validation["output"]["loss"]) == 2
    steps = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    first = [s for s in steps if s["split"] == "train" and s["epoch"] <= 1]
    mean = sum(s["loss"] * s["supervised_tokens"] for s in first) / sum(s["supervised_tokens"] for s in first)
    assert stats.training["output"]["loss"][0] == pytest.approx(mean, rel=1e-6)
    training, validation, test, metadata = data
    assert metadata["examples"] == {"train": 22, "validation": 4, "test": 4}
    pd.testing.assert_frame_equal(training.astype(object), frame.head(22).astype(object))
    assert (len(validation), list(test["input"])) == (4, list(frame["input"][26:]))


def test_without_evaluations_a_value_stands_for_an_epoch() -> None:
    lines = [
        {"split": "train", "step": s, "epoch": s / 3, "loss": float(s), "supervised_tokens": 1} for s in range(1, 7)
    ]
    assert TrainingStats.of("output", lines).training == {"output": {"loss": [2.0, 5.0], "supervised_tokens": [1, 1]}}
    # one that ended within an epoch
    assert TrainingStats.of("output", lines[:5]).training["output"]["loss"] == [2.0, 4.5]
    assert TrainingStats.of("output", []).training == {}


def test_predict_has_ludwigs_columns_and_writes_when_asked(trained, frame, tmp_path) -> None:
    model, _ = trained
    answers, folder = model.predict(frame, split="test", output_directory=str(tmp_path), skip_save_predictions=False)
    assert list(answers.columns) == [f"output_{n}" for n in ("predictions", "response", "probability", "probabilities")]
    assert len(answers) == 4 and all(isinstance(one, list) and len(one) == 1 for one in answers["output_response"])
    assert folder == str(tmp_path) and len(pd.read_parquet(tmp_path / "predictions.parquet")) == 4
    assert len(model.predict(frame.to_dict("list"), data_format="dict", return_type=pd.DataFrame)[0]) == 30


def test_the_split_of_the_training_table_is_known_without_its_column(trained, frame) -> None:
    model, _ = trained
    assert len(model.predict(split="validation")[0]) == 4
    with pytest.raises(DataError, match="no `split` column"):
        model.predict(frame.drop(columns="split"), split="test")
    with pytest.raises(DataError, match="no such split"):
        model.predict(frame, split="tets")


def test_evaluate_writes_when_asked(trained, frame, tmp_path) -> None:
    model, _ = trained
    stats, answers, _ = model.evaluate(frame, split="test", output_directory=str(tmp_path), skip_save_eval_stats=False)
    assert len(answers) == 4
    assert json.loads((tmp_path / "test_statistics.json").read_text()) == stats
    _, none, _ = model.evaluate(frame, split="test", collect_predictions=False)
    assert none.empty


def test_experiment_evaluates_the_held_out_rows_of_a_frame_without_a_split(settings, frame, tmp_path) -> None:
    changed = {**settings, "trainer": {**settings["trainer"], "epochs": 1}}
    model = LudwigModel(changed)
    stats, training, data, folder = model.experiment(
        frame.drop(columns="split"), output_directory=str(tmp_path), skip_save_processed_input=True
    )
    assert set(stats["output"]) >= {"exact_match", "rouge_l"} and training.training["output"]["loss"]
    # rows of one instruction are not one question: the input that the template writes tells them apart
    assert all(len(part) >= 3 for part in (data.training_set, data.validation_set, data.test_set))
    assert len(pd.read_parquet(Path(folder) / "predictions.parquet")) == len(data.test_set)
    assert json.loads((Path(folder) / "test_statistics.json").read_text()) == stats


def test_experiment_passes_on_what_it_is_given(settings, frame, tmp_path) -> None:
    changed = {**settings, "trainer": {**settings["trainer"], "train_steps": 1}}
    model = LudwigModel(changed)
    stats, _, _, folder = model.experiment(
        frame, data_format="df", experiment_name="one", model_name="two", eval_split="validation", random_seed=7,
        skip_save_predictions=True, skip_save_eval_stats=True, skip_collect_predictions=True,
        skip_collect_overall_stats=True, output_directory=str(tmp_path),
    )  # fmt: skip
    assert stats["output"] and folder == str(tmp_path / "one_two-0") and model.config["random_seed"] == 7
    assert not any((Path(folder) / name).exists() for name in ("predictions.parquet", "test_statistics.json"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_split": "tets"}, "eval_split"),
        ({"skip_save_unprocessed_output": False}, "skip_save_unprocessed_output"),
        ({"callbacks": [1]}, "callbacks"),
        ({"training_set_metadata": {}}, "training_set_metadata"),
        ({"data_format": "csv"}, "data_format"),
    ],
)
def test_experiment_refuses_before_anything_is_trained(settings, frame, tmp_path, given, said) -> None:
    with pytest.raises(ConfigError, match=said):
        LudwigModel(settings).experiment(frame, output_directory=str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_load_answers_as_the_trained_one_does(trained, frame) -> None:
    model, results = trained
    for path in (results.output_directory, f"{results.output_directory}/model"):
        again, _ = LudwigModel.load(path).predict(frame, split="test")
        assert list(again["output_response"]) == list(model.predict(frame, split="test")[0]["output_response"])


def test_sets_given_apart_are_trained_and_held_out(settings, frame, tmp_path) -> None:
    plain = frame.drop(columns="split")
    chat = {**settings, "input_features": None, "output_features": None, "prompt": {}}
    talks = [{"messages": [{"role": "user", "content": i}, {"role": "assistant", "content": o}]}
             for i, o in zip(plain["input"], plain["output"], strict=True)]  # fmt: skip
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in talks), encoding="utf-8")
    model = LudwigModel({k: v for k, v in chat.items() if v is not None})
    results = model.train(training_set=str(path), validation_set=talks[:3], output_directory=str(tmp_path / "out"))
    assert results.preprocessed_data.training_set_metadata["examples"] == {"train": 30, "validation": 3, "test": 0}


def test_what_asks_for_something_else_is_refused_by_name(settings, trained, frame) -> None:
    model, _ = trained
    for name, value in (("gpus", [0]), ("backend", {"type": "ray"}), ("gpu_memory_limit", 0.5), ("callbacks", [1])):
        with pytest.raises(ConfigError, match=name):
            LudwigModel(settings, **{name: value})
    with pytest.raises(ConfigError, match="data_format"):
        model.predict(frame, data_format="csv")
    with pytest.raises(ConfigError, match="return_type"):
        model.predict(frame, return_type=dict)
    with pytest.raises(ConfigError, match="skip_save_unprocessed_output"):
        model.evaluate(frame, skip_save_unprocessed_output=False)
    with pytest.raises(ConfigError, match="no dataset is named"):
        LudwigModel(settings).train()
    with pytest.raises(ConfigError, match="give dataset, or"):
        LudwigModel(settings).train(frame, frame)
    LudwigModel(settings, backend="local", callbacks=[])


def test_what_a_run_folder_always_holds_is_told(settings, frame, tmp_path) -> None:
    with pytest.warns(UserWarning, match="skip_save_model, skip_save_progress"):
        LudwigModel({**settings, "trainer": {**settings["trainer"], "train_steps": 1}}).train(
            frame, skip_save_model=True, skip_save_progress=True, output_directory=str(tmp_path)
        )


def test_one_thread_when_parallel_threads_are_not_allowed(settings) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        LudwigModel(settings, allow_parallel_threads=False)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [[], None, 5, b"x"])
@pytest.mark.parametrize("kind", [LudwigModel, Model])
def test_what_is_no_config_is_told_as_one(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(config=value)
    assert caught.value.code == "config-unreadable" and "a dict" in str(caught.value)
