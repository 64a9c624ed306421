"""Reading configs: the seed, positions, suggestions, refusals, overrides, hostile YAML."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.config import Config, dump_yaml, load, with_features, yaml_reader
from luthier.errors import ConfigError, Fault

ROOT = Path(__file__).parents[3]
SEED = ROOT / "examples" / "seed" / "seed_config.yaml"


def faults(source, overrides=()) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return list(caught.value.faults)


def only(source, overrides=()) -> Fault:
    found = faults(source, overrides)
    assert len(found) == 1, [f.message for f in found]
    return found[0]


def test_the_longest_example_may_be_written_twice_in_two_ways():
    for own, ludwig in ((64, "64.0"), ("64", 64), (64.0, 64)):
        given = {"max_sequence_length": own, "global_max_sequence_length": ludwig}
        config = load({"base_model": "smollm2", "preprocessing": given})
        assert config.preprocessing.max_sequence_length == 64


@pytest.mark.parametrize("as_dict", [False, True])
def test_seed_config_every_key_has_its_value(as_dict):
    config = load(pyyaml.safe_load(SEED.read_text()) if as_dict else SEED)
    assert (config.model_type, config.base_model) == ("llm", "huggyllama/llama-7b")
    assert config.input_features and config.input_features[0].name == "instruction"
    assert config.output_features and (config.output_features[0].name, config.output_features[0].type) == (
        "output",
        "text",
    )
    assert config.prompt.template == pyyaml.safe_load(SEED.read_text())["prompt"]["template"]
    generation = config.generation
    assert (generation.temperature, generation.max_new_tokens, generation.do_sample) == (0.1, 512, True)
    assert config.adapter and config.adapter.type == "lora"
    assert config.quantization and config.quantization.bits == 4
    trainer = config.trainer
    assert (trainer.type, trainer.epochs, trainer.batch_size, trainer.eval_batch_size) == ("finetune", 5, 1, 2)
    assert (trainer.gradient_accumulation_steps, trainer.learning_rate, config.effective_batch) == (16, 1e-4, 16)
    optimizer = trainer.optimizer
    assert (optimizer.type, optimizer.eps, optimizer.betas, optimizer.weight_decay) == ("adam", 1e-8, (0.9, 0.999), 0)
    assert trainer.learning_rate_scheduler.warmup_fraction == 0.03
    assert trainer.learning_rate_scheduler.reduce_on_plateau == 0
    silent = {item.key for item in config.filled()}
    assert "adapter.r" in silent and "trainer.epochs" not in silent and "trainer.learning_rate" not in silent


def test_positions_and_all_faults_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "base_model: x\n"
        "trainer:\n"
        "  learning_rat: 1e-4\n"
        "  epochs: 0\n"
        "  optimizer: {type: adam, params: {bets: [0.9, 0.99]}}\n"
        "adapter: {type: lora, r: true}\n"
        "base_model: y\n"
    )
    found = {f.where: f for f in faults(path)}
    name = str(path)
    assert found[f"{name}:3:3 trainer.learning_rat"].code == "config-unknown-key"
    assert found[f"{name}:3:3 trainer.learning_rat"].fix == "did you mean `learning_rate`?"
    assert found[f"{name}:4:3 trainer.epochs"].allowed == "an integer, at least 1"
    assert found[f"{name}:5:36 trainer.optimizer.bets"].fix == "did you mean `betas`?"
    assert found[f"{name}:6:23 adapter.r"].code == "config-bad-value"
    assert found[f"{name}:7:1 base_model"].code == "config-duplicate-key"
    assert len(found) == 5


def test_a_key_in_the_wrong_section_is_pointed_to_its_place():
    assert only({"base_model": "x", "learning_rate": 1}).fix == "did you mean `trainer.learning_rate`?"


def test_names_of_variants_and_values_are_suggested():
    assert only({"base_model": "x", "adapter": {"type": "lorra"}}).fix == "did you mean `lora`?"
    fault = only({"base_model": "x", "preprocessing": {"truncation": "dropp"}})
    assert fault.fix == "did you mean `drop`?" and fault.allowed and "truncate_prompt" in fault.allowed


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"adapters": {"a": {"type": "lora"}}}, "adapters"),
        ({"hyperopt": {"goal": "minimize"}}, "hyperopt"),
        ({"calibration": {}}, "calibration"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"trainer": {"type": "dpo"}}, "not yet"),
        ({"trainer": {"type": "grpo"}}, "not yet"),
        ({"adapter": {"type": "vblora", "r": 4, "num_vectors": 3}}, "vblora"),
        ({"model_type": "ecd"}, "llm"),
        ({"adapter": {"type": "lora", "loftq_config": {"loftq_iter": 2}}}, "one round"),
        ({"input_features": [{"name": "a", "type": "image"}]}, "text"),
        ({"prompt": {"retrieval": {"type": "semantic", "model_name": "m"}}}, "column"),
        ({"generation": {"max_length": 9}}, "max_new_tokens"),
        ({"backend": {"type": "ray"}}, "local"),
        ({"defaults": {"text": {}}}, "features"),
        ({"trainer": {"learning_rate": "auto"}}, "`trainer.learning_rate: auto`"),
        ({"trainer": {"learning_rate": "auto"}}, "give a number"),
    ],
)
def test_ludwig_keys_that_are_not_implemented_are_refused_by_name(section, names):
    fault = only({"base_model": "x", **section})
    assert fault.code == "config-not-implemented"
    assert names in f"{fault.message} {fault.fix}"


def test_a_refused_key_that_is_null_is_absent():
    assert load({"base_model": "x", "hyperopt": None, "prompt": {"retrieval": {"type": None}}}).prompt.retrieval is None


def test_retrieval_is_off_where_all_of_its_keys_are_ludwigs_defaults():
    """As Ludwig writes it out, with all of its keys; it refuses k over 0 without a type itself."""
    off = {"type": None, "index_name": None, "model_name": None, "k": 0}
    assert load({"base_model": "x", "prompt": {"retrieval": off}}).prompt.retrieval is None


@pytest.mark.parametrize(
    "section",
    [
        {"prompt": {"retrieval": {"k": 3}}},
        {"prompt": {"retrieval": {"type": None, "index_name": "rows"}}},
        {"prompt": {"retrieval": {"types": "semantic"}}},
        {"retrieval": {"k": 3}},
        {"retrieval": {"type": None}},
        {"retrieval": {}},
    ],
)
def test_retrieval_without_a_type_is_not_forgotten(section):
    fault = only({"base_model": "x", **section})
    assert fault.code == "config-not-implemented" and "retrieval" in fault.message


def test_rope_scaling_takes_its_older_spelling_too():
    def scaled(**keys):
        return {"base_model": "x", "model_parameters": {"rope_scaling": {**keys, "factor": 2.0}}}

    assert load(scaled(type="dynamic")) == load(scaled(rope_type="dynamic"))
    assert only(scaled(type="linear", rope_type="dynamic")).code == "config-conflict"
    assert "did you mean `dynamic`" in (only(scaled(type="dynamc")).fix or "")
    text = "base_model: x\nmodel_parameters:\n  rope_scaling:\n    factor: 2\n    type: dynamc\n"
    assert (only(text).where or "").startswith("config:5:5 ")


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ({"preprocessing": {"split": {"probabilities": [0.5, 0.5]}}}, "preprocessing.split.probabilities", "2 values"),
        ({"preprocessing": {"split": {"probabilities": []}}}, "preprocessing.split.probabilities", "0 values"),
        ({"trainer": {"optimizer": {"betas": [0.9]}}}, "trainer.optimizer.betas", "1 values"),
        ({"trainer": {"optimizer": {"betas": [0.9, 0.9, 0.9]}}}, "trainer.optimizer.betas", "3 values"),
    ],
)
def test_a_list_of_the_wrong_length_is_the_list_that_is_wrong(section, key, said):
    fault = only({"base_model": "x", **section})
    assert (fault.code, fault.where) == ("config-bad-value", f"config {key}")
    assert said in fault.message and str(fault.allowed).startswith("a list of") and isinstance(fault.received, list)


def test_an_override_begins_a_list():
    config = load({"base_model": "x"}, ["input_features.0.name=a", "generation.stop.0=END"])
    assert config.input_features is not None and config.input_features[0].name == "a"
    assert config.generation.stop == ("END",)
    with pytest.raises(ConfigError, match="a list of 0"):
        load({"base_model": "x"}, ["input_features.1.name=a"])
    assert load({"base_model": "x"}, ["generation.logit_bias.0=1"]).generation.logit_bias == {"0": 1.0}


@pytest.mark.parametrize(
    "section",
    [
        {"adapter": {"type": "oft", "module_dropout": 0.1}},  # PEFT never applies it
        {"quantization": {"bits": 4}, "adapter": None},
        {"prompt": {"task": "do it", "template": "{a}"}},
        {"generation": {"do_sample": True, "temperature": 0}},
        {"generation": {"min_new_tokens": 9, "max_new_tokens": 3}},
        {"trainer": {"steps_per_checkpoint": 3, "checkpoints_per_epoch": 2}},
        {"trainer": {"use_mixed_precision": True, "precision": "fp32"}},
        {"trainer": {"optimizer": {"type": "sgd", "betas": [0.9, 0.9]}}},
        {"trainer": {"optimizer": {"eps": 1e-8, "params": {"eps": 1e-6}}}},
        {"trainer": {"learning_rate_scheduler": {"warmup_fraction": 0.1, "warmup_steps": 3}}},
        {"trainer": {"learning_rate": 1e-4, "learning_rate_scheduler": {"eta_min": 2e-4}}},
        {"trainer": {"optimizer": {"lr": 1e-5}, "learning_rate_scheduler": {"eta_min": 2e-5}}},
        {"adapter": None, "trainer": {"learning_rate_scheduler": {"eta_min": 1e-4}}},
        {"preprocessing": {"max_sequence_length": 64, "global_max_sequence_length": 65}},
        {"preprocessing": {"split": {"probabilities": [0.5, 0.1, 0.1]}}},
        {"preprocessing": {"split": {"type": "datetime"}}},
    ],
)
def test_keys_that_contradict_each_other(section):
    assert only({"base_model": "x", **section}).code == "config-conflict"


@pytest.mark.parametrize(
    "section",
    [
        {"trainer": {"learning_rate": -1}},
        {"trainer": {"learning_rate": "inf"}},
        {"trainer": {"batch_size": 0}},
        {"trainer": {"batch_size": "aut"}},
        {"quantization": {"bits": 3}},
        {"random_seed": -1},
        {"random_seed": True},
        {"generation": {"top_p": 1.5}},
        {"model_parameters": {"rope_scaling": {"rope_type": "linear", "factor": 1}}},
        {"base_model": 7},
        {"prompt": "text"},
        {"input_features": []},
    ],
)
def test_values_out_of_range(section):
    fault = only({"base_model": "x", **section})
    assert fault.code == "config-bad-value" and fault.allowed


@pytest.mark.parametrize(("written", "meant"), [("exponental", "exponential"), ("nul", "null")])
def test_words_beside_the_or_are_suggested_whole(written, meant):
    fault = only({"base_model": "x", "trainer": {"learning_rate_scheduler": {"decay": written}}})
    assert fault.fix == f"did you mean `{meant}`?"


def test_defaults_of_luthier():
    config = load({"base_model": "x"})
    adapter = config.adapter
    assert adapter and adapter.type == "lora" and (adapter.r, adapter.alpha, adapter.dropout) == (16, 32, 0.0)
    assert adapter.target_modules is None
    assert config.trainer.learning_rate == 2e-4 and config.trainer.type == "finetune" and config.trainer.epochs == 3
    assert config.effective_batch == 16 and config.random_seed == 42
    assert config.generation.do_sample is False and config.generation.max_new_tokens == 256
    full = load({"base_model": "x", "adapter": None})
    assert full.adapter is None and full.trainer.learning_rate == 2e-5
    assert load({"base_model": "x", "adapter": {"type": "lora", "r": 4}}).adapter.alpha == 8


def test_defaults_of_ludwig_fill_every_absent_key():
    config = load(
        {"base_model": "x", "defaults": "ludwig", "adapter": {"type": "lora"}, "trainer": {"type": "finetune"}}
    )
    assert config.adapter and (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (8, 16, 0.05)
    assert config.adapter.target_modules and "q_proj" in config.adapter.target_modules
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.epochs, trainer.batch_size, trainer.eval_batch_size) == (1e-3, 100, 1, 2)
    assert trainer.gradient_accumulation_steps == "auto" and trainer.optimizer.type == "adam"
    assert trainer.gradient_clipping.clipglobalnorm == 0.5 and trainer.learning_rate_scheduler.decay is None
    assert config.preprocessing.split.probabilities == (0.7, 0.1, 0.2) and config.preprocessing.split.type == "random"
    assert (trainer.loss_normalization, trainer.eval_generation_rows) == ("micro_batch", None)
    generation = config.generation
    assert (generation.max_new_tokens, generation.temperature, generation.do_sample, generation.top_k) == (
        32,
        0.1,
        True,
        50,
    )
    bare = load({"base_model": "x", "defaults": "ludwig"})
    assert bare.adapter is None and bare.trainer.type == "none"
    assert (
        load({"base_model": "x", "defaults": "ludwig", "generation": {"temperature": 0}}).generation.do_sample is False
    )


@pytest.mark.parametrize(
    ("given_keys", "samples"),
    [({}, False), ({"temperature": 0}, False), ({"temperature": 0.7}, True), ({"top_p": 0.9}, True),
     ({"temperature": 0.7, "do_sample": False}, False), ({"do_sample": True}, True), ({"do_sample": "true"}, True),
     ({"do_sample": "false", "temperature": "0.7"}, False), ({"temperature": "0.7"}, True), ({"top_k": 5}, True),
     ({"min_p": 0.1}, True), ({"typical_p": 0.9}, True), ({"typical_p": 1.0}, False),
     ({"top_k": 5, "temperature": 0}, False),
     ({"top_k": 5, "do_sample": False}, False), ({"epsilon_cutoff": 0.1}, False)],
)  # fmt: skip
def test_when_answers_are_sampled(given_keys, samples):
    assert load({"base_model": "x", "generation": given_keys}).generation.do_sample is samples


def test_overrides_win_and_are_yaml():
    config = load(
        "base_model: x\ntrainer: {epochs: 2}\n", ["trainer.epochs=7", "trainer.learning_rate=1e-3", "adapter=null"]
    )
    assert (config.trainer.epochs, config.trainer.learning_rate, config.adapter) == (7, 1e-3, None)
    fault = only("base_model: x\ntrainer: {epochs: 2}\n", ["trainer.epochs=0"])
    assert fault.where == "--set trainer.epochs=0"


def test_an_override_of_the_adapter_is_said_of_the_default_one():
    adapter = load("base_model: x\n", ["adapter.r=4"]).adapter
    assert (adapter.type, adapter.r) == ("lora", 4)
    assert load("base_model: x\n", ["adapter.rank_dropout=0.1", "adapter.type=loha"]).adapter.type == "loha"
    for source in ("base_model: x\nadapter: {r: 4}\n", "base_model: x\nadapter: null\n"):
        fault = only(source, ["adapter.alpha=8"])
        assert (fault.allowed[:2], fault.fix) == (["lora", "adalora"], "add `type: lora`")


@pytest.mark.parametrize(
    "override", ["trainer.epochs", "trainer.epochs=", "=3", "base_model.x=1", "input_features.4.name=b", "name={a: [}"]
)
def test_bad_overrides(override):
    source = {"base_model": "x", "input_features": [{"name": "a"}]}
    assert only(source, [override]).code == "config-bad-override"


def test_round_trips():
    config = load(SEED)
    assert load(config.to_dict()) == config
    assert load(dump_yaml(config)) == config
    assert config != load(SEED, ["trainer.epochs=1"])
    other = load({"base_model": "x", "defaults": "ludwig"})
    assert load(other.to_dict()) == other


def test_a_config_is_frozen_and_with_features_makes_a_new_one():
    config = load({"base_model": "x"})
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.epochs = 9
    derived = with_features(config, ["a", "b"], "c", "category")
    assert config.input_features is None
    assert [f.name for f in derived.input_features] == ["a", "b"] and derived.output_features[0].type == "category"
    assert with_features(derived, ["z"], "z") == derived


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), "too many"),
        ("a: &a [*a]\n", "inside its own anchor"),
        ("a: *b\n", "no anchor"),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", "deeply"),
        ("a: !!python/object/apply:os.system [ls]\n", "tag"),
        ("a: !x y\n", "tag"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "merge keys"),
        ("? [a, b]\n: c\n", "plain text"),
        ("a: 1\n---\nb: 2\n", "more than one"),
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("a: {b}: c\n", "not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("\n", "not a mapping"),
        ("a: \x00\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_hostile_and_broken_yaml(text, says):
    fault = only(text)
    assert fault.code == "config-unreadable" and says in fault.message


def test_unreadable_files(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"base_model: caf\xe9\n")
    assert "UTF-8" in only(tmp_path / "config.yaml").message
    assert "config.yaml" in only(tmp_path / "confg.yaml").fix
    assert only(tmp_path).code == "config-unreadable"
    (tmp_path / "big.yaml").write_bytes(b"#" * 10_000_001)
    assert "too large" in only(tmp_path / "big.yaml").message
    (tmp_path / "utf16.yaml").write_bytes("base_model: モデル\n".encode("utf-16"))
    assert load(tmp_path / "utf16.yaml").base_model == "モデル"


LARGEST = {  # the pieces between a beginning and an end that make a config as large as may be, or full of faults
    "list": ("a: [", "1,", "]"),
    "block list": ("a:\n", "- 1\n", ""),
    "floats": ("a: [", "1.5e3,", "]"),
    "keys": ("", "k%d: 1\n", ""),
    "flow keys": ("a: {", "k%d: 1,", "}"),
    "nested": ("a: [", "[1],", "]"),
    "deep": ("a: [", "[" * 30 + "]" * 30 + ",", "]"),
    "mappings": ("a: [", "{},", "]"),
    "tagged": ("a: [", "!!str x,", "]"),
    "aliases": ("a: [&a x,", "*a,", "]"),
    "plain": ("a: ", "x", ""),
    "words": ("a: ", "x ", ""),
    "lines": ("a: ", "x\n ", ""),
    "quoted": ('a: "', "\\n", '"'),
    "literal": ("a: |\n", "\n", ""),
    "folded": ("a: >\n", " x\n", ""),
    "comments": ("", "#\n", ""),
    "directives": ("", "%a\n", ""),
    "wrong values": ("base_model: x\npreprocessing: {redact: [", "k,", "]}"),
    "wrong items": ("base_model: x\ninput_features:\n", "- k%d\n", ""),
    "wrong keys": ("base_model: x\ntrainer:\n", " k%deeeeeeeeeeeeeeeeeeeee: 1\n", ""),
    "repeated keys": ("", "k: 1\n", ""),
    "classes": ("base_model: x\noutput_features: [{name: a, type: category, preprocessing: {vocab: [", "k%d,", "]}}]"),
}


@pytest.mark.parametrize("shape", LARGEST)
def test_the_largest_configs_take_less_than_a_second(shape):
    """As many bytes as may be, and as many values: of processor time, so that a loaded machine fails no test."""
    begin, piece, end = LARGEST[shape]
    most = (yaml_reader.MAX_BYTES - len(begin) - len(end) - 1) // (len(piece) + 3)
    for count in (most, min(most, (yaml_reader.MAX_NODES - 20) // (1 + piece.count(":")))):
        text = begin + "".join(piece % i if "%d" in piece else piece for i in range(count)) + end + "\n"
        times: list[float] = []
        while len(times) < 3 and min(times, default=1) >= 1:
            began = time.process_time()
            with suppress(ConfigError):
                load(text)
            times.append(time.process_time() - began)
        assert min(times) < 1, times


def test_more_faults_than_anybody_reads_are_counted():
    found = faults("base_model: x\ntrainer: {" + "".join(f"k{i}: 1," for i in range(1500)) + "}\n")
    assert len(found) == 1001 and found[-1].message == "500 more are wrong"


def test_yaml_1_2_scalars():
    config = load("base_model: 'no'\nname: on\ntrainer: {learning_rate: 1e-4, epochs: 0o12}\n")
    assert (config.base_model, config.name, config.trainer.epochs) == ("no", "on", 10)
    fault = only("base_model: x\nname: 123\n")
    assert fault.fix and "quote" in fault.fix


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_a_config_error(text):
    try:
        config = load(text + "\n")
    except ConfigError as error:
        assert all(fault.code.startswith("config-") for fault in error.faults)
    else:
        assert isinstance(config, Config)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)), _values, max_size=5))
def test_any_dict_is_a_config_or_a_config_error(data):
    try:
        load({"base_model": "x", **data})
    except ConfigError as error:
        assert str(error)


def test_config_imports_no_heavy_library():
    heavy = "('torch', 'transformers', 'pandas', 'numpy')"
    code = f"import luthier.config, sys; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_an_override_that_names_how_to_draw_draws() -> None:
    greedy = load("base_model: x\n").to_dict()  # as a run folder holds it: with every key
    assert greedy["generation"]["do_sample"] is False

    def drawn(held, *overrides) -> tuple[bool, float]:
        made = load(held, [f"generation.{override}" for override in overrides]).generation
        return made.do_sample, made.temperature

    assert drawn(greedy) == (False, 0.0)
    assert drawn(greedy, "temperature=0.7") == (True, 0.7)
    assert drawn(greedy, "top_p=0.9") == (True, 1.0)
    assert drawn(greedy, "max_new_tokens=9") == (False, 0.0)
    warm = load("base_model: x\ngeneration: {temperature: 0.5}\n").to_dict()
    assert drawn(warm, "temperature=0") == (False, 0.0)
    assert drawn(warm, "top_k=3") == (True, 0.5)
    assert drawn(warm, "temperature=0.2", "do_sample=false") == (False, 0.2)


@pytest.mark.parametrize("value", [[], None, 5, b"x"])
def test_what_is_no_config_at_all_is_told(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load(value)  # type: ignore[arg-type]
    fault = caught.value.faults[0]
    assert fault.code == "config-unreadable" and fault.received == ("None" if value is None else value)
    assert "a dict" in str(fault.allowed) and fault.fix
