"""After an evaluation the run folder says what came out: evaluation.json, report.html, the model card."""

from __future__ import annotations

import json
import os

import pandas
import pytest

from luthier import config, console, pipeline
from luthier.api import LudwigModel
from luthier.data.sources import hub, memory
from luthier.errors import ConfigError, DataError, RunError
from luthier.evaluate import Comparison
from luthier.events import Event, Note, Warned
from luthier.run import recorded_inputs
from luthier.tuned import Tuned


def test_report_and_card_show_the_comparison_and_keep_what_a_person_wrote(train, rows, tmp_path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = train(data=table, trainer__eval_generation_rows=4)
    card = made.folder / "adapter" / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("## Use", "My own words.\n\n## Use"), encoding="utf-8")
    tuned = pipeline.load(made.folder)
    for count in (2, 4):  # a later evaluation takes the place of the one before it
        comparison = pipeline.evaluate(tuned, rows=count, shots=1)
        assert json.loads((made.folder / "evaluation.json").read_text())["count"] == count
    report = (made.folder / "report.html").read_text(encoding="utf-8")
    assert "base, 1-shot" in report and "Loss by step" in report
    text = card.read_text(encoding="utf-8")
    assert text.count("## Results") == 1 and "On 4 rows" in text and "| base, 1-shot |" in text
    assert "tuned, on validation rows" not in text and "type: lora" in text
    # what stood after the results and before the next heading was a part of them; the rest is untouched
    assert text.count("## Use") == 1
    assert len(comparison.rows) == 4


def test_a_table_of_ones_own_needs_the_training_table_for_examples_alone(train, rows) -> None:
    tuned = pipeline.load(train().folder)  # trained on rows in memory, which are gone
    assert len(pipeline.evaluate(tuned, rows[36:], shots=0).rows) == 4
    with pytest.raises(RunError, match="the examples for the base come from the table of the training") as caught:
        pipeline.evaluate(tuned, rows[36:], shots=1)
    fault = caught.value.faults[0]
    assert fault.code == "run-no-table" and "data in memory" in str(fault.received) and "--shots 0" in (fault.fix or "")
    with pytest.raises(RunError, match="the held-out rows come from the table of the training") as caught:
        pipeline.evaluate(tuned)
    assert "--dataset FILE" in (caught.value.faults[0].fix or "")
    with pytest.raises(RunError, match="the rows that predict answers") as caught:
        tuned.predict(None)
    assert caught.value.faults[0].fix == "name the rows to answer: dataset=…"


def test_a_run_folder_that_is_gone_is_told_before_anything_is_asked(train, rows, monkeypatch) -> None:
    tuned = pipeline.load(train().folder)
    moved = tuned.folder.rename(tuned.folder.with_name("moved"))

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("it was asked")

    with monkeypatch.context() as patched:
        patched.setattr(Tuned, "answer", asked)
        with pytest.raises(RunError, match="is not there any more") as caught:
            pipeline.evaluate(tuned, rows[36:], shots=0)
    fault = caught.value.faults[0]
    assert (fault.code, fault.where, fault.received) == ("run-not-a-run", str(tuned.folder), "nothing")
    assert "Model.load" in (fault.fix or "")
    assert len(pipeline.evaluate(pipeline.load(moved), rows[36:], shots=0).rows) == 4


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 2}, None])  # without one the base is loaded to compare with
def test_a_run_is_found_after_the_working_directory_has_changed(settings, rows, adapter, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings |= {"adapter": adapter, "base_model": os.path.relpath(settings["base_model"])}
    made = pipeline.train(config.load(settings), rows, output="run")
    loaded = pipeline.load("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert made.folder == tmp_path / "run" == made.tuned.folder == loaded.folder
    for tuned in (made.tuned, loaded):
        assert len(pipeline.evaluate(tuned, rows[36:], shots=0).rows) == 4
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["count"] == 4
    assert made.to_json()["state"] == "finished"
    assert (made.to_json()["run"], made.to_json()["report"]) == ("run", os.path.join("run", "report.html"))


@pytest.mark.parametrize(
    ("name", "value"), [("rows", 0), ("rows", -1), ("rows", 2.5), ("rows", True), ("shots", -1), ("shots", None)]
)
def test_numbers_of_rows_and_examples_that_are_none_are_refused(train, rows, name, value) -> None:
    tuned = pipeline.load(train().folder)
    with pytest.raises(ConfigError, match=f"{name} is not a number") as caught:
        pipeline.evaluate(tuned, rows[36:], **{name: value})
    fault = caught.value.faults[0]
    assert fault.code == "config-bad-value" and fault.where == name and "at least" in str(fault.allowed)


def test_a_comparison_that_cannot_be_written_is_returned_and_told(train, rows) -> None:
    tuned, heard = pipeline.load(train().folder), []
    for name in ("evaluation.json", "report.html"):
        (tuned.folder / name).unlink(missing_ok=True)
        (tuned.folder / name).mkdir()
    assert len(pipeline.evaluate(tuned, rows[36:], shots=0, sink=heard.append).rows) == 4
    told = [event.text for event in heard if isinstance(event, Warned)]
    assert [("evaluation.json was not written" in one, "report" in one) for one in told] == [
        (True, False),
        (False, True),
    ]


def test_a_table_that_is_gone_or_has_changed_is_named(train, rows, tmp_path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = train(data=table).folder
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        pipeline.evaluate(pipeline.load(folder))
    assert caught.value.faults[0].received == f"{table} has changed since the training"
    table.unlink()
    with pytest.raises(RunError) as caught:
        pipeline.evaluate(pipeline.load(folder))
    assert caught.value.faults[0].received == f"{table} is not there any more"


def test_a_run_on_a_hub_dataset_finds_its_rows_again_when_they_are_needed(train, rows, monkeypatch) -> None:
    read: list[str] = []

    def from_hub(name: str, *_: object) -> object:
        read.append(name)
        return memory.from_rows(rows, name)

    monkeypatch.setattr(hub, "read_hub", from_hub)
    folder = train(data="owner/parcels").folder
    assert recorded_inputs(None, folder / "config.yaml").dataset == "owner/parcels", "to go on with"
    tuned = pipeline.load(folder)
    assert len(read) == 1, "prediction needs no table"
    compared = pipeline.evaluate(tuned, shots=1)
    assert [one.name for one in compared.contestants] == ["base", "base, 1-shot", "tuned"] and len(compared.rows) == 4
    assert len(read) == 2

    def offline(name: str, *_: object) -> object:
        raise DataError("data-unreadable", "it is not in the hub cache")

    monkeypatch.setattr(hub, "read_hub", offline)
    with pytest.raises(RunError) as caught:
        pipeline.evaluate(pipeline.load(folder), rows[36:], shots=1)
    assert caught.value.faults[0].received == "owner/parcels cannot be read: it is not in the hub cache"


def test_what_cannot_be_compared_says_what_is_missing(train) -> None:
    tuned = pipeline.load(train().folder)
    with pytest.raises(DataError, match="has no column 'label'") as caught:
        pipeline.evaluate(tuned, [{"text": "parcel 1 slow"}])
    assert "luthier predict" in caught.value.faults[0].fix and "did you mean" not in caught.value.faults[0].fix
    with pytest.raises(DataError, match="has no column 'label'") as caught:
        pipeline.evaluate(tuned, [{"text": "parcel 1 slow", "labels": "late"}])
    assert "did you mean 'labels'? evaluation compares" in caught.value.faults[0].fix
    with pytest.raises(DataError, match=r"no row of .* holds an answer"):
        pipeline.evaluate(tuned, [{"text": "parcel 1 slow", "label": None}])
    with pytest.raises(DataError, match="has no column 'text'") as caught:
        tuned.predict([{"txt": "parcel 1 slow", "label": "late"}])
    assert caught.value.faults[0].fix == "did you mean 'txt'?"


@pytest.mark.parametrize("template", [None, "{__sample__}\n"], ids=["none", "sample"])
def test_a_column_that_the_prompt_takes_unnamed_is_missed_before_anything_is_asked(train, template) -> None:
    tuned = pipeline.load(train(prompt__template=template).folder)
    with pytest.raises(DataError, match="has no column 'text'") as caught:
        tuned.predict([{"txt": "parcel 1 slow"}])
    assert caught.value.faults[0].fix == "did you mean 'txt'?"


def test_running_text_trains_and_evaluates_by_its_loss_alone(train, settings) -> None:
    """It has no answers to generate and compare; the first evaluation ended the run."""
    for key in ("input_features", "output_features", "prompt"):
        del settings[key]
    texts = [{"text": f"parcel {i} goes its way", "split": 0 if i < 32 else 1 if i < 36 else 2} for i in range(40)]
    made = train(data=texts, trainer__eval_generation_rows=4)
    (found,) = json.loads((made.folder / "outcome.json").read_text())["evaluations"]
    assert found["loss"] > 0 and "exact_match" not in found
    with pytest.raises(DataError, match="no held-out row holds an answer") as caught:
        pipeline.evaluate(made.tuned)
    assert caught.value.code == "data-no-target"


def test_validation_rows_without_an_answer_are_not_generated_for(train, rows, settings) -> None:
    del settings["output_features"][0]["type"]
    del settings["input_features"], settings["output_features"], settings["prompt"]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": row["label"]},
                *([{"role": "user", "content": "thanks"}] if number != 33 else []),
            ],
            "split": row["split"],
        }
        for number, row in enumerate(rows)
    ]
    made = train(data=chats, trainer__eval_generation_rows=2)
    (found,) = json.loads((made.folder / "outcome.json").read_text())["evaluations"]
    assert 0 <= found["exact_match"] <= 1


def test_a_row_that_could_not_be_asked_is_no_class_and_is_told(train, rows, settings, tmp_path) -> None:
    settings["output_features"][0]["decoder"] = {"type": "category_extractor", "fallback_label": "late"}
    long = [row | {"text": row["text"] + " far" * 3000} if row["split"] == 1 else row for row in rows]
    heard = []
    made = train(data=long, trainer__eval_generation_rows=4, trainer__epochs=2, sink=heard.append)
    told = [event.text for event in heard if isinstance(event, Warned) and "could not be asked" in event.text]
    assert len(told) == 1 and told[0].startswith("validation: 4 of 4 rows")
    answered = made.tuned.predict([long[32] | {"label": "late"}, long[0]])
    assert answered.predictions[0] == "" and answered.unasked.startswith("1 of 2 rows could not be asked")
    frame = answered.ludwig_frame()
    assert "context" in frame["label_error"][0] and pandas.isna(frame["label_error"][1])
    model = LudwigModel.load(str(made.folder))
    with pytest.warns(UserWarning, match="1 of 2 rows could not be asked"):
        model.predict(pandas.DataFrame([long[32], long[0]]))


def _told(tuned: Tuned, dataset: object) -> tuple[Comparison, list[str], list[str]]:
    heard: list[Event] = []
    found = pipeline.evaluate(tuned, dataset, shots=0, sink=heard.append)
    return (found, *([event.text for event in heard if isinstance(event, kind)] for kind in (Note, Warned)))


def test_of_the_table_of_the_training_its_held_out_rows_are_compared(train, rows, tmp_path) -> None:
    """All 40 rows were scored and called held-out, those of the training included."""
    table, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = train(data=table)
    table.rename(copy)  # where it stands, and whether the run still finds it, changes nothing
    found, notes, warned = _told(pipeline.load(made.folder), copy)
    assert found.rows == (36, 37, 38, 39) and found.held_out and not warned
    assert any("is the table of the training: its 4 test rows are compared" in one for one in notes)
    assert _told(made.tuned, rows)[0].rows == found.rows, "the rows in memory, and the model that was just trained"


def test_of_another_table_with_a_split_column_its_test_rows_are_compared(train, rows) -> None:
    tuned = train().tuned
    own = [{**row, "text": f"other {i}", "split": "train" if i < 5 else "validation"} for i, row in enumerate(rows[:8])]
    found, notes, warned = _told(tuned, own)
    assert found.rows == (5, 6, 7) and found.held_out and not warned
    assert any("the column 'split' of" in one and "its 3 validation rows are compared, of 8" in one for one in notes)


def test_rows_that_the_run_was_trained_on_are_counted_and_not_called_held_out(train, rows, capsys) -> None:
    made = train()
    own = [{name: row[name] for name in ("text", "label")} for row in rows[30:]]  # 32 and on were held out
    found, _, (warned,) = _told(made.tuned, own)
    assert len(found.rows) == 10 and not found.held_out
    assert warned.startswith("2 of the 10 rows of ") and "the rows that the run was trained on" in warned
    console.show_comparison(found.to_json(), 0)
    assert "held-out" not in capsys.readouterr().out
    assert "10 held-out rows" not in (made.folder / "report.html").read_text(encoding="utf-8")
    card = (made.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "On 10 rows:" in card
    assert Comparison.from_json(json.loads((made.folder / "evaluation.json").read_text())) == found
    fresh, _, warned = _told(made.tuned, [{"text": "never seen", "label": "late"}])
    assert not warned and not fresh.held_out, "nobody held it out; it is new"


def test_without_the_table_of_the_training_the_hashes_of_its_rows_tell_what_was_seen(train, rows) -> None:
    tuned = pipeline.load(train().folder)  # trained on rows in memory, which are gone
    found, _, (warned,) = _told(tuned, [*rows[30:32], {**rows[0], "text": "new"}])
    assert len(found.rows) == 3 and warned.startswith("2 of the 3 rows of ")
    assert _told(tuned, rows[36:])[2] == [], "these were its test rows, as their column says"
