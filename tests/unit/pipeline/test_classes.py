"""Category outputs: answers are classes, probabilities are scores, one temperature is fitted on the validation rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier import config, events, pipeline
from luthier.cli import main
from luthier.errors import ConfigError
from luthier.infer.engine import DecoderEngine
from luthier.metrics.calibration import fit, softmax
from luthier.tuned.tuned import SCORED


@pytest.fixture
def table(rows, tmp_path) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def zero_shot(settings: dict[str, Any], **output: Any) -> Any:
    made = {**settings, "trainer": {"type": "none", "precision": "fp32"}, "adapter": None}
    made["prompt"] = {"template": "{__task__}: {text}\n", "task": "late or early?"}
    made["output_features"] = [{"name": "label", "type": "category", **output}]
    return config.load(made)


def rules(**values: str) -> dict[str, Any]:
    return {name: {"type": "contains", "value": value} for name, value in values.items()}


@pytest.mark.parametrize("model", ["decoder", "generic"])
def test_zero_shot_scores_are_those_of_plain_transformers(settings, rows, tiny_llama, model) -> None:
    match = rules(late="too slow", early="quick", lost="gone")
    settings["execution"] = {"model": model}
    made = zero_shot(settings, decoder={"type": "category_extractor", "match": match})
    tuned = pipeline.untuned(made)
    long = {"text": "a parcel that came a long way round, " * 3}  # beginnings of the prompts that are worth sharing
    answered = tuned.predict([*rows[:4], long])
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for at, row in enumerate([*rows[:4], long]):
        prompt = tuned.tokenizer.encode(f"late or early?: {row['text']}\n")
        totals = []
        for text in ("too slow", "quick", "gone"):
            ids = [*tuned.tokenizer.encode(text), tuned.tokenizer.eos_id]
            with torch.no_grad():
                logprobs = plain(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            totals.append(float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(ids))))
        assert answered.log_probabilities[at] == pytest.approx(totals, rel=1e-4)
        assert answered.probabilities[at] == pytest.approx(softmax(totals), rel=1e-3)
        assert sum(answered.probabilities[at]) == pytest.approx(1)
        best = max(range(3), key=totals.__getitem__)
        assert answered.texts[at] == ("too slow", "quick", "gone")[best]
        assert answered.predictions[at] == ("late", "early", "lost")[best]


def test_draws_are_made_among_the_classes_alone(settings, rows) -> None:
    tuned = pipeline.untuned(zero_shot(settings, preprocessing={"vocab": ["late", "early"]}))
    hot = {"temperature": 3.0, "max_new_tokens": 8}
    texts = tuned.predict(rows, generation=hot).texts
    assert set(texts) == {"late", "early"}
    free = pipeline.untuned(zero_shot(settings, preprocessing={"vocab": ["late", "early"]}, constrained=False))
    assert not {"late", "early"} & set(free.predict(rows[:4], generation=hot).texts)


@pytest.mark.parametrize("template", [True, False])
def test_chat_answers_with_the_class_that_predict_gives(settings, rows, template) -> None:
    made = zero_shot(settings, preprocessing={"vocab": ["late", "early"]})
    if not template:
        made = config.load({**made.model_dump(exclude_unset=True), "prompt": {"chat_template": True}})
    tuned = pipeline.untuned(made)
    talk = tuned.chat()
    assert ["".join(talk.say(row["text"])) for row in rows[:6]] == tuned.predict(rows[:6]).texts
    assert {"".join(talk.say(rows[0]["text"], generation={"temperature": 3.0})) for _ in range(4)} <= {"late", "early"}


def test_free_answers_are_read_by_the_rules_and_the_fallback_is_a_class(settings, rows) -> None:
    decoder = {"type": "category_extractor", "match": rules(late="\0", early="\1"), "fallback_label": "unclear"}
    free = pipeline.untuned(zero_shot(settings, decoder=decoder, constrained=False)).predict(rows[:3])
    assert free.predictions == ["unclear"] * 3
    assert free.classes == ("late", "early", "unclear")
    held = pipeline.untuned(zero_shot(settings, decoder=decoder)).predict(rows[:3])
    assert set(held.texts) <= {"\0", "\1", "unclear"}


@pytest.mark.parametrize("output", ["category", "text"])
def test_answers_are_scored_as_they_come(settings, output, monkeypatch) -> None:
    """A kill loses no more than what waits for its probabilities; the groups change nothing."""
    given = {"preprocessing": {"vocab": ["late", "early"]}, "constrained": False} if output == "category" else {}
    count, made = SCORED + 44, zero_shot(settings, **given).to_dict()
    made["output_features"][0]["type"] = output
    tuned = pipeline.untuned(config.load(made))
    table = tuned.read([{"text": f"row {i}" if i % 40 else "x" * 512} for i in range(count)])
    made_before, run, told = list[int](), DecoderEngine.generate, list[events.Event]()
    monkeypatch.setattr(
        DecoderEngine, "generate", lambda self, asked: (made_before.append(one.key) or one for one in run(self, asked))
    )
    each = tuned.each(table, range(count), probabilities=True, sink=told.append)
    first = [next(each) for _ in range(5)]
    assert len(made_before) <= SCORED < count
    found = {done.key: (done, scores) for done, scores in [*first, *each]}
    assert sorted(found) == sorted(made_before) == list(range(count))
    progress = [event for event in told if isinstance(event, events.Progress) and event.stage == "generate"]
    counts = [event.completed for event in progress]
    assert counts == sorted(counts) and counts[-1] == count and {event.total for event in progress} == {count}
    monkeypatch.setattr("luthier.tuned.tuned.SCORED", count)
    for done, scores in tuned.each(table, range(count), probabilities=True):
        assert done == found[done.key][0]
        assert scores == pytest.approx(found[done.key][1], abs=1e-4)


def test_two_classes_of_one_text_are_told_apart_by_their_names(settings, rows) -> None:
    decoder = {"type": "category_extractor", "match": rules(late="x", early="x")}
    assert set(pipeline.untuned(zero_shot(settings, decoder=decoder)).predict(rows[:3]).texts) <= {"late", "early"}


def test_a_category_without_classes_says_so(settings) -> None:
    told = []
    pipeline.untuned(zero_shot(settings), sink=told.append)
    assert any("names no classes" in getattr(event, "text", "") for event in told)


def test_a_prompt_without_room_for_its_class_is_an_error_of_its_row(settings, rows) -> None:
    tuned = pipeline.untuned(zero_shot(settings, preprocessing={"vocab": ["late", "early"]}))
    answered = tuned.predict([rows[0], {"text": "x" * 512}, rows[1]])
    assert [done.finish_reason for done in answered.completions] == ["stop", "error", "stop"]
    assert "the model's context of 512" in answered.completions[1].error
    assert answered.probabilities[1] == () and answered.probability[1] is None


def test_the_temperature_is_fitted_on_validation_rows_kept_and_used(train, rows, table) -> None:
    made = train(data=table)
    known = json.loads((made.folder / "calibration.json").read_text())
    assert known["rows"] == 4 and known["bins"] == 15
    tuned = pipeline.load(made.folder)
    assert tuned.temperature == known["temperature"]
    held = tuned.predict(rows[32:36])
    assert fit(held.log_probabilities, [held.classes.index(row["label"]) for row in rows[32:36]]).temperature == (
        pytest.approx(known["temperature"], rel=1e-6)
    )
    assert held.probabilities[0] == pytest.approx(softmax(held.log_probabilities[0], known["temperature"]))
    base = tuned.predict(rows[32:36], use_base=True)
    assert base.probabilities[0] == pytest.approx(softmax(base.log_probabilities[0]))  # the temperature is not its own
    assert tuned.save(made.folder.parent / "copy").joinpath("calibration.json").is_file()
    report = (made.folder / "report.html").read_text(encoding="utf-8")
    card = (made.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Calibration" in report and "Guo et al. 2017" in report
    assert "on validation 4 rows" in card and f"{known['temperature']:.3f}" in card


def test_without_validation_rows_there_is_no_temperature(train, rows) -> None:
    made = train(data=[{**row, "split": 0 if row["split"] == 1 else row["split"]} for row in rows])
    assert not (made.folder / "calibration.json").exists()
    assert made.tuned.temperature == 1.0
    assert all(sum(each) == pytest.approx(1) for each in made.tuned.predict(rows[36:]).probabilities)


def test_the_whole_through_the_command_line(settings, table, tmp_path, monkeypatch, capsys) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(json.dumps(settings), encoding="utf-8")

    def run(*argv: str) -> str:
        monkeypatch.setattr("sys.argv", ["luthier", *argv])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    run("train", str(file), "--dataset", str(table), "--output", str(out), "--json")
    answers = tmp_path / "answers.csv"
    run("predict", str(out), "--dataset", str(table), "--output", str(answers), "--json")
    import pandas as pd

    frame = pd.read_csv(answers)
    assert list(frame.columns) == ["row", "response", "finish_reason", "prediction", "probability"]
    assert set(frame["prediction"]) <= {"early", "late"} and frame["probability"].between(0.5, 1).all()
    compared = json.loads(run("evaluate", str(out), "--json", "--shots", "1"))
    tuned = compared["contestants"][-1]["calibration"]
    temperature = json.loads((out / "calibration.json").read_text())["temperature"]
    assert tuned["temperature"] == temperature and tuned["rows"] == 4 and 0 <= tuned["error"] <= 1
    assert compared["contestants"][0]["calibration"]["temperature"] == 1.0
    shown = " ".join(run("evaluate", str(out), "--shots", "0").split())
    assert "expected calibration error" in shown and "without the temperature" in shown
    assert "these 4 rows" in (out / "adapter" / "README.md").read_text(encoding="utf-8")


def test_rows_with_an_answer_that_is_not_allowed_are_refused(settings, rows) -> None:
    feature = {**settings["output_features"][0], "preprocessing": {"vocab": ["early", "lost"]}}
    made = config.load({**settings, "output_features": [feature]})
    with pytest.raises(ConfigError, match="8 rows have an answer") as refused:
        pipeline.prepare(made, rows)
    assert refused.value.faults[0].received == "late"
    allowed = {**feature, "preprocessing": {"vocab": ["lost", "late", "early"]}}
    work = pipeline.prepare(config.load({**settings, "output_features": [allowed]}), rows)
    assert work.layout.classes == ("lost", "late", "early")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["Yes", "yes ", "No", "NO"], ["'NO' (10 rows) and 'No' (10 rows)", "'Yes' (10 rows) and 'yes ' (10 rows)"]),
        (["はい", "いいえ", "ＯＫ", "ok"], ["'ok' (10 rows) and 'ＯＫ' (10 rows)"]),
        (["yes", "no", "y es", "maybe"], []),
    ],
)
def test_classes_that_differ_in_case_or_blanks_alone_are_told_and_not_merged(settings, labels, told) -> None:
    heard: list[Any] = []
    rows = [{"text": f"parcel {i}", "label": labels[i % 4]} for i in range(40)]
    work = pipeline.check(config.load(settings), rows, sink=heard.append)
    warned = [one.text for one in heard if isinstance(one, events.Warned) and "classes of 'label'" in one.text]
    assert len(warned) == bool(told) and work.layout.classes == tuple(sorted(labels))
    for part in [*told, *(["one way in the table"] if told else [])]:
        assert part in warned[0]


@pytest.mark.parametrize(
    ("labels", "kind", "told"),
    [
        (["yes"] * 40, "category", "all 32 rows to learn from have one answer in 'label': 'yes'"),
        (["yes"] * 40, "text", "all 32 rows to learn from have one answer in 'label': 'yes'"),
        (["yes"] * 32 + ["no"] * 8, "category", "all 32 rows to learn from"),  # the other class is held out
        (["yes"] * 31 + ["no"] * 9, "category", None),
        (["yes", None] * 16 + ["no"] * 8, "category", "all 16 rows to learn from"),
    ],
)
def test_rows_that_all_have_one_answer_are_told(settings, rows, labels, kind, told) -> None:
    settings["output_features"][0]["type"] = kind
    heard: list[Any] = []
    table = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    pipeline.check(config.load(settings), table, sink=heard.append)
    warned = [one.text for one in heard if isinstance(one, events.Warned) and "one answer" in one.text]
    assert len(warned) == bool(told) and (not told or told in warned[0])


LUDWIGS = {"temperature": 0.1, "top_p": 0.75, "top_k": 40, "num_beams": 4}  # of its example of zero-shot classification


@pytest.mark.parametrize("generation", [{"num_beams": 4}, LUDWIGS, {"num_beams": 2, "length_penalty": 2.0}])
@pytest.mark.parametrize("model", ["decoder", "generic"])
def test_beams_over_classes_find_the_likeliest(settings, rows, model, generation) -> None:
    match = rules(late="too slow", early="quick", lost="gone")
    settings["execution"] = {"model": model}
    plain = pipeline.untuned(
        zero_shot(settings, decoder={"type": "category_extractor", "match": match}, constrained=True)
    )
    settings["generation"] |= generation
    beamed = zero_shot(settings, decoder={"type": "category_extractor", "match": match}, constrained=True)
    told: list[Any] = []
    found, want = pipeline.untuned(beamed).predict(rows[:6], sink=told.append), plain.predict(rows[:6])
    assert found.texts == want.texts and set(found.texts) <= {"too slow", "quick", "gone"}
    assert found.probabilities == want.probabilities
    assert [one.text for one in told if "num_beams" in getattr(one, "text", "")] == [
        f"generation.num_beams: {generation['num_beams']} has no effect: every class is scored, and the likeliest taken"
    ]


@pytest.mark.parametrize("more", [{"n": 2}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_beams_that_cannot_be_held_to_classes_are_refused_before_training(settings, rows, train, more) -> None:
    settings["generation"] |= {"num_beams": 4, **more}
    with pytest.raises(ConfigError, match="beams hold no answer to the classes") as caught:
        train()
    assert caught.value.code == "config-conflict" and "constrained: false" in str(caught.value)
    tuned = pipeline.untuned(zero_shot(settings, preprocessing={"vocab": ["late", "early"]}))
    with pytest.raises(ConfigError, match="beams hold no answer"):
        tuned.predict(rows[:2])
    settings["output_features"] = [{"name": "label", "type": "category", "constrained": False}]
    assert len(train("free").tuned.predict(rows[:2]).texts) == 2  # free text, as it says
