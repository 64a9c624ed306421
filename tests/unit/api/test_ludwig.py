"""Ludwig's calling conventions: its signatures in its order, its result shapes; nothing given is ignored."""

from __future__ import annotations

import inspect
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from luthier.api import LudwigModel, Model, TrainingStats
from luthier.errors import ConfigError, DataError, Interrupted, RunError

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
    values = {"loss": [2.0, 5.0], "supervised_tokens": [3, 3]}
    assert TrainingStats.of("output", lines).training == {"output": values, "combined": {"loss": [2.0, 5.0]}}
    # one that ended within an epoch
    assert TrainingStats.of("output", lines[:5]).training["output"]["loss"] == [2.0, 4.5]
    assert TrainingStats.of("output", []).training == {}


def test_each_value_of_training_is_of_all_steps_since_the_evaluation_before() -> None:
    def step(at: int, loss: float | None, tokens: int, speed: float, **more: Any) -> dict[str, Any]:
        return {"split": "train", "step": at, "epoch": at / 2, "loss": loss, "supervised_tokens": tokens,
                "tokens": 10, "tokens_per_s": speed, "gradient_norm": float(at), "learning_rate": 1 / at,
                "rows": 4} | more  # fmt: skip

    evaluated = [
        {"split": "validation", "step": at, "epoch": at / 2, "loss": loss} for at, loss in ((2, 1.0), (4, None))
    ]
    lines = [step(1, 1.0, 1, 10.0), step(2, 4.0, 2, 5.0), evaluated[0],
             step(3, None, 1, 10.0, skipped=1), step(4, 3.0, 7, 10.0), evaluated[1]]  # fmt: skip
    stats = TrainingStats.of("output", lines)
    found = stats.training["output"]
    assert found == {
        "loss": [3.0, 3.0], "gradient_norm": [1.5, 3.5], "tokens_per_s": [pytest.approx(20 / 3), 10.0],
        "supervised_tokens": [3, 8], "tokens": [20, 20], "rows": [8, 8], "skipped": [0, 1],
        "learning_rate": [0.5, 0.25],
    }  # fmt: skip
    losses = stats.validation["output"]["loss"]
    assert losses[0] == 1.0 and math.isnan(losses[1]) and len(losses) == 2


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


def test_losses_are_those_that_training_measures(trained, frame) -> None:
    model, (stats, _, _) = trained
    names = ("loss", "perplexity", "token_accuracy")
    kept = stats.validation["output"]["loss"].index(min(stats.validation["output"]["loss"]))
    validated, _, _ = model.evaluate(frame, split="validation")
    for name in names:
        assert validated["output"][name] == pytest.approx(stats.validation["output"][name][kept], rel=1e-5)
    tested, _, _ = model.evaluate(frame, split="test")
    assert tested["combined"] == {"loss": tested["output"]["loss"]} and {"rouge_l", "exact_match"} <= set(
        tested["output"]
    )
    assert stats.test["output"] == {name: [pytest.approx(tested["output"][name], rel=1e-6)] for name in names}
    assert stats.test["combined"] == {"loss": stats.test["output"]["loss"]}
    assert stats.validation["combined"]["loss"] == stats.validation["output"]["loss"]


def test_the_loss_is_of_rows_with_an_answer_and_of_the_tuned_model(trained, frame) -> None:
    from luthier.infer.score import logprobs_of

    model, _ = trained
    rows = frame.head(6).copy()
    rows.loc[3:, "output"] = None
    found, answers, _ = model.evaluate(rows)
    tuned = model._model._ready()
    examples = [tuned.renderer.examples(dict(row), i)[0] for i, row in enumerate(rows.head(3).to_dict("records"))]
    likely = [value for each in logprobs_of(tuned.model, examples) for value in each]
    assert len(answers) == 6 and found["output"]["loss"] == pytest.approx(-sum(likely) / len(likely), rel=1e-5)
    assert found["output"]["perplexity"] == pytest.approx(math.exp(found["output"]["loss"]))
    with pytest.raises(DataError, match="no row holds a reference"):
        model.evaluate(rows.tail(2))


def test_stats_of_all_are_counted_where_there_are_classes(settings, frame, trained, tmp_path) -> None:
    model, _ = trained
    with_all, _, _ = model.evaluate(frame, split="test", collect_overall_stats=True)
    assert with_all == model.evaluate(frame, split="test")[0]  # of text Ludwig has none
    rows = frame.assign(output=["late" if i % 3 == 0 else "early" for i in range(len(frame))])
    output = [{"name": "output", "type": "category"}]
    classed = LudwigModel({**settings, "output_features": output, "trainer": {**settings["trainer"], "train_steps": 1}})
    stats, _, _, folder = classed.experiment(rows, output_directory=str(tmp_path))
    assert sum(map(sum, stats["output"]["confusion_matrix"])) == 4 and stats["output"]["overall_stats"]
    assert json.loads((Path(folder) / "test_statistics.json").read_text()) == stats
    plain, answers, _ = classed.evaluate(rows, split="test")
    assert not {"confusion_matrix", "overall_stats", "per_class_stats"} & set(plain["output"])
    right = (answers["output_predictions"] == list(rows["output"][26:])).mean()
    assert stats["output"]["overall_stats"]["token_accuracy"] == pytest.approx(right)


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
    assert stats["output"] and folder == str(tmp_path / "one_two-0")
    assert _lock(folder)["seed"] == 7 and model.config["random_seed"] == 42  # an argument of that call alone
    assert not any((Path(folder) / name).exists() for name in ("predictions.parquet", "test_statistics.json"))


def _lock(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["lock"]


def test_a_seed_given_to_train_holds_for_that_call(one_step, frame, tmp_path) -> None:
    model = LudwigModel({**one_step, "random_seed": 3})
    seeds = [_lock(model.train(frame, output_directory=str(tmp_path), random_seed=s)[2])["seed"] for s in (7, None)]
    assert seeds == [7, 3]


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


SETS = ("training_set", "validation_set", "test_set")


@pytest.mark.parametrize("method", ["train", "experiment"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (SETS[1:], "validation_set and test_set without training_set"),
        (("dataset", "test_set"), "test_set without training_set"),
        (("dataset", "training_set"), "dataset and training_set are both given"),
    ],
)
def test_sets_that_would_be_ignored_are_refused(settings, frame, tmp_path, method, given, said) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        getattr(LudwigModel(settings), method)(**dict.fromkeys(given, frame), output_directory=str(tmp_path / "out"))
    assert caught.value.code == "config-conflict" and not (tmp_path / "out").exists()


@pytest.fixture
def one_step(settings) -> dict[str, Any]:
    return {**settings, "trainer": {**settings["trainer"], "train_steps": 1}}


def _sets(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    plain = frame.drop(columns="split")
    return {"training_set": plain[:20], "validation_set": plain[20:25], "test_set": plain[25:]}


@pytest.mark.parametrize(
    "more",
    [
        {"preprocessing": {"split": {"type": "random", "probabilities": [0.5, 0.3, 0.2]}}},
        {"preprocessing": {"split": {"type": "stratify", "column": "output"}}},
        {"defaults": "ludwig"},
    ],
)
def test_the_sets_are_the_split_whatever_the_config_says(one_step, frame, tmp_path, more) -> None:
    model = LudwigModel({**one_step, **more})
    sets, out = _sets(frame), str(tmp_path / "out")

    def told() -> Any:
        return pytest.warns(UserWarning, match="split .* is not used") if "preprocessing" in more else nullcontext()

    with told():
        results = model.train(**sets, output_directory=out)
    for given, kept in zip(sets.values(), list(results.preprocessed_data)[:3], strict=True):
        assert list(kept["input"]) == list(given["input"])
    folder = Path(results.output_directory)
    assert json.loads((folder / "run.json").read_text())["lock"]["config"]["preprocessing"]["split"]["type"] == "fixed"
    assert len(model.predict(split="test")[0]) == 5  # of the rows that were held out
    assert model.config["preprocessing"]["split"]["type"] != "fixed"  # for the next table, the config's own holds
    again = LudwigModel({**one_step, **more})
    with told():
        assert again.train(**sets, model_resume_path=str(folder)).output_directory == str(folder)
    with told(), pytest.raises(RunError, match="another run"):
        again.train(**{**sets, "training_set": sets["training_set"][1:]}, model_resume_path=str(folder))


def test_a_run_of_sets_that_was_ended_goes_on(one_step, frame, tmp_path, monkeypatch) -> None:
    trainer = {**one_step["trainer"], "train_steps": 2, "steps_per_checkpoint": 1}
    model = LudwigModel({**one_step, "defaults": "ludwig", "trainer": trainer})
    sets, folder = _sets(frame), tmp_path / "run-0"

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("luthier.pipeline.training.report", ended)
        model.train(**sets, output_directory=str(tmp_path))
    results = model.train(**sets, model_resume_path=str(folder))
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    assert results.preprocessed_data.training_set_metadata["examples"] == {"train": 20, "validation": 5, "test": 5}


def test_a_run_to_go_on_with_that_is_not_there_is_no_new_one(one_step, frame, tmp_path) -> None:
    (tmp_path / "run-3").mkdir()
    (tmp_path / "run-3" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    model = LudwigModel(one_step)
    for name, fix in (("runs-3", "run-3'"), ("empty", "leave model_resume_path out")):
        with pytest.raises(RunError, match="no run to go on with") as caught:
            model.train(frame, model_resume_path=str(tmp_path / name))
        fault = caught.value.faults[0]
        assert fault.code == "run-not-a-run" and fault.received == str(tmp_path / name)
        assert fix in str(fault.fix) and str(tmp_path / "run-3") in str(fault.allowed)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty", "run-3"] and not any(
        (tmp_path / "empty").iterdir()
    )


def test_sets_are_read_as_a_dataset_is_and_keep_their_values_as_written(one_step, tmp_path) -> None:
    path, book = tmp_path / "train.csv", tmp_path / "held.xlsx"
    path.write_bytes("input,output,note\nété,oui,a\nçà,non,b\n".encode("cp1252"))
    with pd.ExcelWriter(book) as writer:
        pd.DataFrame({"x": ["not this one"], "y": ["nor this"]}).to_excel(writer, sheet_name="cover", index=False)
        pd.DataFrame({"input": ["là"], "output": ["oui"]}).to_excel(writer, sheet_name="held", index=False)
    numbers = [{"input": "a", "output": "oui", "n": 1}, {"input": "b", "output": "non", "n": 2}]
    config = {**one_step, "input_features": [{"name": "input", "type": "text"}], "prompt": {"template": "{input} {n}"}}
    model = LudwigModel({**config, "preprocessing": {"encoding": "cp1252", "sheet": "held"}})
    results = model.train(
        training_set=pd.DataFrame(numbers), validation_set=str(path), test_set=str(book), output_directory=str(tmp_path)
    )
    training, validation, test, _ = results.preprocessed_data
    assert [repr(n) for n in training["n"]] == ["1", "2"] and list(validation["n"]) == [None, None]
    assert list(validation["input"]) == ["été", "çà"] and list(test["input"]) == ["là"]
    limited = LudwigModel({**config, "preprocessing": {"limits": {"file_bytes": 10}}})
    with pytest.raises(DataError, match="larger than the limit"):
        limited.train(training_set=str(path), output_directory=str(tmp_path))


def test_a_split_column_of_a_set_may_say_what_the_set_says_and_nothing_else(one_step, frame, tmp_path) -> None:
    model = LudwigModel(one_step)
    sets = {name: frame[frame["split"] == side] for side, name in enumerate(SETS)}
    model.train(**sets, output_directory=str(tmp_path / "out"), random_seed=7)
    results = model.train(**sets, output_directory=str(tmp_path / "out"))  # which tells of no split: nobody named one
    assert results.preprocessed_data.training_set_metadata["examples"] == {"train": 22, "validation": 4, "test": 4}
    for wrong in (frame, frame.assign(split="upper left"), frame.assign(split=None)):
        with pytest.raises(DataError, match="says another set") as caught:
            model.train(training_set=wrong, output_directory=str(tmp_path / "other"))
        assert caught.value.code == "data-split" and "training_set (DataFrame) row" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_what_asks_for_something_else_is_refused_by_name(settings, trained, frame) -> None:
    model, _ = trained
    for name, value in (("gpus", [0]), ("backend", {"type": "ray"}), ("gpu_memory_limit", 0.5), ("callbacks", [1])):
        with pytest.raises(ConfigError, match=name):
            LudwigModel(settings, **{name: value})
    threads = torch.get_num_threads()
    with pytest.raises(ConfigError) as caught:
        LudwigModel(settings, gpus=0, gpu_memory_limit=0.5, allow_parallel_threads=False, backend="ray")
    told = {fault.where: fault.fix for fault in caught.value.faults}
    assert set(told) == {"LudwigModel backend", "LudwigModel gpus", "LudwigModel gpu_memory_limit"}
    assert "execution.device" in told["LudwigModel gpus"]
    assert "execution.memory_limit" in told["LudwigModel gpu_memory_limit"]
    assert torch.get_num_threads() == threads
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
