"""Keys of the config whose effect is only seen in a whole run; one test each."""

from __future__ import annotations

import json
import re

import pytest
import torch

from luthier import config, pipeline
from luthier.errors import AssetError, ConfigError, LuthierError
from luthier.events import Event, Stepped, Warned
from luthier.pipeline import planning
from luthier.run import RunFolder
from luthier.run.verify import verify


def test_balance_classes_draws_each_class_equally_often(train, settings, rows) -> None:
    seen: list[Stepped] = []
    plain = train("plain", sink=lambda e: seen.append(e) if isinstance(e, Stepped) else None)
    balanced = train("balanced", preprocessing__balance_classes=True)
    # 32 training rows, 7 of them late: an epoch then has 25 of each
    assert sum(1 for e in seen if e.split == "train") == 4
    assert len(plain.history["train"]["loss"]) == 4
    assert sum(balanced.history["train"]["rows"]) == 50
    need = planning.need_of(config.load(settings, ["preprocessing.balance_classes=true"]), rows)
    assert len(need.stats.lengths) == 50


def test_balance_classes_needs_classes(settings, rows) -> None:
    settings["output_features"] = [{"name": "label", "type": "text"}]
    made = config.load(settings, ["preprocessing.balance_classes=true"])
    with pytest.raises(ConfigError) as caught:
        pipeline.prepare(made, rows)
    assert caught.value.faults[0].where == "preprocessing.balance_classes"


@pytest.mark.parametrize(("key", "value"), [("template", "{messages}\n"), ("task", "Be kind.")])
def test_what_has_no_place_in_a_conversation_is_refused(tiny_llama, key: str, value: str) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    made = config.load({"base_model": str(tiny_llama), "prompt": {key: value}})
    with pytest.raises(ConfigError, match="no place") as caught:
        pipeline.prepare(made, [{"messages": turns}] * 20)
    assert caught.value.faults[0].where == f"prompt.{key}"


def test_a_system_message_needs_a_conversation(settings, rows) -> None:
    said = settings | {"prompt": {"system": "Be brief.", "template": "{text}\n"}}
    with pytest.raises(ConfigError, match="plain text") as caught:
        pipeline.prepare(config.load(said), rows)
    assert caught.value.faults[0].where == "prompt.system"
    said["prompt"]["chat_template"] = True
    assert "Be brief." in pipeline.prepare(config.load(said), rows).renderer.prompt(rows[0]).text


SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


@pytest.mark.parametrize(
    ("prompt", "told", "opening"),
    [
        ({"template": "{text}\n"}, "'system' is a system prompt that no row is written with", "parcel 0"),
        ({"template": "{system}\n{text}\n"}, None, "Be kind.\nparcel 0"),
        ({"template": "{text}\n", "chat_template": True}, None, f"{SYSTEM}<|im_start|>user\nparcel 0"),
        ({"template": "{system} {text}\n", "chat_template": True}, None, "<|im_start|>user\nBe kind. parcel 0"),
        ({"system": "Hm."}, "prompt.system is written where the column 'system' is empty", SYSTEM),
    ],
)
def test_a_column_of_system_prompts_is_written_once_or_said_to_be_left_out(
    settings, rows, prompt: dict[str, object], told: str | None, opening: str
) -> None:
    heard: list[str] = []
    made = pipeline.prepare(
        config.load(settings | {"prompt": prompt}),
        [row | {"system": "Be kind."} for row in rows],
        sink=lambda e: heard.append(e.text) if isinstance(e, Warned) else None,
    )
    assert made.renderer.prompt(made.table.row(0)).text.startswith(opening)
    assert [told in text for text in heard if "system" in text] == ([True] if told else [])


def test_a_task_without_a_template_stands_before_the_inputs(settings, rows) -> None:
    """Ludwig's zero-shot classification."""
    made = pipeline.prepare(config.load(settings | {"prompt": {"task": "Say early or late."}}), rows)
    assert made.renderer.prompt(rows[0]).text == "Say early or late.\nparcel 0 slow\n"
    text = config.load({"base_model": settings["base_model"], "prompt": {"task": "Say it."}})
    with pytest.raises(ConfigError, match="running text"):
        pipeline.prepare(text, [{"text": f"a line of text {i}"} for i in range(20)])


@pytest.mark.parametrize(
    ("template", "told"),
    [("{text}\n", ["note"]), ("{note}: {text}", []), ("{__sample__}", []), ("{split}", ["text", "note"])],
)
def test_an_input_that_the_template_leaves_out_is_said(settings, rows, template: str, told: list[str]) -> None:
    settings |= {"input_features": [{"name": "text"}, {"name": "note"}], "prompt": {"template": template}}
    heard: list[str] = []
    pipeline.check(
        config.load(settings),
        [row | {"note": f"n {i}"} for i, row in enumerate(rows)],
        sink=lambda e: heard.append(e.text) if isinstance(e, Warned) else None,
    )
    said = [text for text in heard if "prompt.template" in text]
    assert len(said) == bool(told) and all(name in text for text in said for name in told)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"warmup_steps": 9}, "warmup_steps: 9 is longer than the run: the warm-up is cut to 4 steps"),
        ({"warmup_evaluations": 2.5}, "warmup_evaluations: 2.5 (10 steps) is longer than the run"),
        ({"warmup_steps": 4}, None),
        ({"warmup_evaluations": 1}, None),
        ({"warmup_fraction": 1.0}, None),
    ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_told_before_training(settings, rows, given, said) -> None:
    settings["trainer"]["learning_rate_scheduler"] = given  # 32 training rows, 8 a step, one epoch
    for look in (pipeline.check, planning.need_of):
        heard: list[Event] = []
        look(config.load(settings), rows, sink=heard.append)
        told = [one.text for one in heard if isinstance(one, Warned) and "warm-up" in one.text]
        assert len(told) == (said is not None) and (said is None or said in told[0])


def test_evaluate_training_set_tells_the_loss_on_training_rows(train) -> None:
    assert "train_evaluation" not in train("without").history
    made = train("with", trainer__evaluate_training_set=True)
    assert len(made.history["train_evaluation"]["loss"]) == 1
    outcome = json.loads((made.folder / "outcome.json").read_text())
    assert outcome["evaluations"][0]["train/loss"] == made.history["train_evaluation"]["loss"][0]


def test_validation_field_may_name_the_output_and_nothing_else(train) -> None:
    train("right", trainer__validation_field="label")
    with pytest.raises(ConfigError) as caught:
        train("wrong", trainer__validation_field="lable")
    assert caught.value.faults[0].allowed == ["label"]


ADALORA = {"type": "adalora", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1}


def silent_ranks(model: torch.nn.Module) -> float:
    """The share of AdaLoRA's ranks that are masked."""
    values = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_E" in n])
    return float((values == 0).float().mean())


def test_adalora_gives_ranks_away_by_its_schedule_and_loads_as_it_was(train) -> None:
    made = train(adapter=ADALORA, trainer__epochs=2, trainer__early_stop=-1)
    assert silent_ranks(made.tuned.model.module) == pytest.approx(0.75, abs=0.05)  # target_r 1 of init_r 4
    prompts = ["parcel 3 fast\n", "parcel 5 slow\n"]
    want = made.tuned.generate(prompts)
    again = pipeline.load(made.folder)
    assert again.generate(prompts) == want
    mine, loaded = (dict(one.model.module.named_parameters()) for one in (made.tuned, again))
    names = [name for name in mine if "lora_" in name]
    assert names and all(torch.equal(mine[name], loaded[name]) for name in names)


def test_adalora_without_room_to_shrink_is_refused(settings) -> None:
    with pytest.raises(ConfigError, match="target_r is not below init_r"):
        config.load({**settings, "adapter": {"type": "adalora", "init_r": 4, "target_r": 4}})


def test_adalora_orth_reg_weight_pulls_the_factors_together(train) -> None:
    def distance(weight: float) -> float:
        adapter = {**ADALORA, "tinit": 7, "tfinal": 0, "orth_reg_weight": weight}
        made = train(f"w{weight}", adapter=adapter, trainer__epochs=2)
        factors = [p.detach() for n, p in made.tuned.model.module.named_parameters() if "lora_A" in n]
        return float(sum(torch.linalg.matrix_norm(a @ a.T - torch.eye(len(a))) for a in factors))

    assert distance(50.0) < distance(0.0) - 1  # in a run as short as this


@pytest.mark.parametrize("adapter", [{**ADALORA}, {"type": "lora", "r": 4, "dropout": 0.2}])
def test_an_interrupted_run_goes_on_bit_for_bit(train, adapter) -> None:
    options = {
        "adapter": adapter,
        "trainer__epochs": 2,
        "trainer__steps_per_checkpoint": 2,
        "model_parameters__neftune_noise_alpha": 5.0,
    }
    straight = train("straight", **options)

    class Stop(Exception):
        pass

    def crash(event) -> None:
        if isinstance(event, Stepped) and event.split == "train" and event.step == 5:
            raise Stop

    with pytest.raises(Stop):
        train("broken", sink=crash, **options)
    resumed = train("broken", **options)
    assert json.loads((resumed.folder / "outcome.json").read_text())["resumed_from"] == 4
    one, two = (dict(made.tuned.model.module.named_parameters()) for made in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_merged_model_answers_as_the_adapter_does(train) -> None:
    made = train(adapter__postprocessor__merge_adapter_into_base_model=True, trainer__epochs=3)
    folder = made.folder / "merged"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {one.name for one in folder.iterdir()}
    again = pipeline.untuned(config.load({"base_model": str(folder), "generation": {"max_new_tokens": 6}}))
    prompts = ["parcel 3 fast\n", "parcel 5 slow\n"]
    assert again.generate(prompts) == made.tuned.generate(prompts)
    run = RunFolder.load(made.folder)
    assert [(one.what, one.faults, one.known) for one in verify(run)][-1] == ("merged", (), True)
    (folder / "config.json").write_text("{}")
    assert "config.json" in verify(run)[-1].faults[0]
    with pytest.raises(AssetError, match=r"config\.json") as caught:
        pipeline.untuned(config.load({"base_model": str(folder)}))
    assert caught.value.code == "asset-damaged"


def test_a_category_output_is_read_by_its_rules(train, rows) -> None:
    rules = {"late": {"type": "regex", "value": "^(?!x)x"}, "early": {"type": "contains", "value": "\u0000"}}
    output = [
        {
            "name": "label",
            "type": "category",
            "decoder": {"type": "category_extractor", "match": rules, "fallback_label": "late"},
            "constrained": False,
        }
    ]
    made = train(output_features=output)
    answered = made.tuned.predict(rows[:4])
    assert not {"early", "late"} & set(answered.texts)
    assert answered.predictions == ["late"] * 4  # no rule fits, nor does a class: the fallback


def test_labels_of_rules_are_classes(train) -> None:
    rules = {"latte": {"type": "contains", "value": "late"}}
    output = [{"name": "label", "type": "category", "decoder": {"type": "category_extractor", "match": rules}}]
    with pytest.raises(ConfigError) as caught:
        train(output_features=output)
    assert caught.value.faults[0].received == "latte"
    assert caught.value.faults[0].allowed == ["early", "late"]


@pytest.mark.parametrize("generation", [{"forced_bos_token_id": 99999}, {"logit_bias": {"two tokens": 1.0}}])
def test_settings_of_answers_that_cannot_be_are_told_before_training(settings, rows, generation) -> None:
    with pytest.raises(ConfigError, match=next(iter(generation))):
        pipeline.check(config.load({**settings, "generation": generation}), rows)


@pytest.mark.parametrize(
    "features",
    [
        {"input_features": [{"name": "text", "column": "words"}]},
        {"output_features": [{"name": "label", "type": "category", "preprocessing": {"max_sequence_length": 8}}]},
        {"trainer__compile": True},
    ],
)
def test_a_key_that_would_be_ignored_is_refused(train, features) -> None:
    with pytest.raises(LuthierError) as caught:
        train(**features)
    assert caught.value.code == "config-not-implemented"


def test_class_probabilities_sum_to_one(train, rows) -> None:
    made = train()
    answered = made.tuned.predict(rows[36:], probabilities=True)
    assert all(sum(each) == pytest.approx(1) for each in answered.probabilities)
    frame = answered.ludwig_frame()
    assert list(frame.columns) == [
        "label_predictions",
        "label_response",
        "label_probability",
        "label_probabilities",
        "label_probabilities_early",
        "label_probabilities_late",
    ]
    for prediction, chances, chance in zip(
        frame["label_predictions"], frame["label_probabilities"], frame["label_probability"], strict=True
    ):
        assert chance == dict(zip(("early", "late"), chances, strict=True))[prediction]
    base = made.tuned.predict(rows[36:], probabilities=True, use_base=True)
    assert base.probabilities != answered.probabilities


def test_class_probabilities_are_those_of_the_answers_as_trained(train, rows) -> None:
    made = train(execution__model="generic")  # whose module is asked directly below
    answered = made.tuned.predict(rows[36:38])
    module, tokenizer = made.tuned.model.module, made.tuned.tokenizer
    prompt = list(made.tuned.renderer.prompt(rows[37]).ids)
    totals = []
    for name in ("early", "late"):
        ids = [*tokenizer.encode(name), tokenizer.eos_id]
        with torch.no_grad():
            logits = module(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        totals.append(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))
    want = (torch.stack(totals) / made.tuned.calibration.temperature).softmax(0).tolist()
    assert answered.probabilities[1] == pytest.approx(want, rel=1e-4)
    likeliest = max(zip(answered.probabilities[1], ("early", "late"), strict=True))[1]
    assert (answered.texts[1], answered.predictions[1]) == (likeliest, likeliest)


def test_text_probability_is_the_product_of_its_tokens(train, rows) -> None:
    made = train(execution__model="generic", output_features=[{"name": "label", "type": "text"}])
    answered = made.tuned.predict(rows[36:38], probabilities=True)
    module, done = made.tuned.model.module, answered.completions[0]
    prompt = list(made.tuned.renderer.prompt(rows[36]).ids)
    with torch.no_grad():
        logits = module(torch.tensor([[*prompt, *done.ids]])).logits[0].log_softmax(-1)
    want = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(done.ids)).exp()
    assert answered.probability[0] == pytest.approx(float(want), rel=1e-4)
    assert len(answered.ludwig_frame()["label_probabilities"][0]) == len(done.ids)


def test_the_model_card_stands_beside_the_weights(train) -> None:
    made = train(trainer__eval_generation_rows=4)
    card = (made.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    for part in ('library_name: "peft"', "trained on 32 rows", "type: lora", "| tuned, on validation rows |", "torch"):
        assert part in card, part
    assert card.count("### Sample ") == 3 and "parcel 36" in card
    report = (made.folder / "report.html").read_text(encoding="utf-8").split("<h2>Samples</h2>")[1].split("<details")[0]
    assert re.findall(r"parcel \d+ \w+", card) == re.findall(r"parcel \d+ \w+", report), "the report's own"


def test_all_validation_rows_are_answered_where_their_number_is_left_empty(train, monkeypatch) -> None:
    from luthier.pipeline import fitting

    asked: list[int] = []
    scores = fitting._generated_scores
    monkeypatch.setattr(
        fitting, "_generated_scores", lambda tuned, rows, *more: asked.append(len(rows)) or scores(tuned, rows, *more)
    )
    made = train(trainer__eval_generation_rows=None)
    assert set(asked) == {made.rows["validation"]} and made.rows["validation"] > 1
    assert "macro_f1" in made.history["validation"]


def test_a_run_folder_is_uploaded_as_its_adapter(train, monkeypatch) -> None:
    from luthier.api import LudwigModel
    from luthier.export import hub

    sent = {}
    monkeypatch.setattr(hub, "upload", lambda folder, repo, **options: sent.update(folder=folder, repo=repo) or "there")
    made = train()
    assert LudwigModel.upload_to_hf_hub("me/mine", str(made.folder)) == "there"
    assert sent == {"folder": made.folder / "adapter", "repo": "me/mine"}


def test_all_weights_tuned_are_compared_with_their_base(train, rows) -> None:
    made = train(adapter=None, trainer__epochs=4, output_features=[{"name": "label", "type": "text"}])
    assert (made.folder / "weights" / "model.safetensors").is_file()
    report = (made.folder / "report.html").read_text(encoding="utf-8")
    assert ">before<" in report
    base = pipeline.untuned(made.tuned.config).predict(rows[36:]).texts
    again = pipeline.load(made.folder)
    assert again.predict(rows[36:], use_base=True).texts == base
    assert again.predict(rows[36:]).texts == made.tuned.predict(rows[36:]).texts != base


@pytest.mark.parametrize("named", ["adapter", "."])
def test_going_on_from_an_adapter_or_its_run_starts_where_it_ended(named: str, train) -> None:
    first = train("first", trainer__epochs=4)
    start = {"type": "lora", "r": 4, "pretrained_adapter_weights": str(first.folder / named)}
    second = train("second", adapter=start)
    began, went_on = (made.history["train"]["loss"] for made in (first, second))
    assert went_on[0] == pytest.approx(began[-1], abs=0.1)
    assert went_on[0] < began[0] - 0.3


def test_an_adapter_that_is_gone_on_from_keeps_its_shape_and_a_config_that_says_another_is_refused(train) -> None:
    first = train("first", adapter={"type": "lora", "r": 4, "alpha": 12, "target_modules": ["v_proj", "q_proj"]})
    source = {"type": "lora", "pretrained_adapter_weights": str(first.folder / "adapter")}
    second = train("second", adapter={**source, "dropout": 0.25})
    kept = config.load(second.folder / "config.yaml").adapter
    assert (kept.r, kept.alpha, set(kept.target_modules), kept.dropout) == (4, 12, {"q_proj", "v_proj"}, 0.25)
    known = json.loads((second.folder / "adapter" / "adapter_config.json").read_text())
    assert (known["r"], known["lora_alpha"], known["lora_dropout"]) == (4, 12, 0.25)
    with pytest.raises(ConfigError) as caught:
        train("third", adapter={**source, "r": 8, "alpha": 12, "use_rslora": True, "target_modules": ["q_proj"]})
    assert {fault.where for fault in caught.value.faults} == {
        f"adapter.{name}" for name in ("r", "use_rslora", "target_modules")
    }
    with pytest.raises(LuthierError, match="another type"):
        train("fourth", adapter={**source, "type": "loha"})
    # the run folder's own config says the adapter's shape, and goes on
    pipeline.train(config.load(second.folder / "config.yaml"), second.tuned.table.rows, output=second.folder)


def test_a_tracker_that_is_not_installed_is_told_before_the_model_is_loaded(train, monkeypatch) -> None:
    import sys

    from luthier.errors import DependencyError
    from luthier.events import Stage

    monkeypatch.setitem(sys.modules, "wandb", None)
    seen: list[str] = []
    with pytest.raises(DependencyError):
        train(trainer__track=["wandb"], sink=lambda e: seen.append(e.name) if isinstance(e, Stage) else None)
    assert "load" not in seen
