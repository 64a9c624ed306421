"""Every generation key is honoured or refused."""

from __future__ import annotations

import pytest

from luthier.errors import ConfigError
from luthier.infer.sampling import idle, resolve
from luthier.infer.words import banned_ids
from luthier.types import Sampling


def test_defaults_and_section():
    assert resolve(None) == Sampling()
    got = resolve({"max_new_tokens": 7, "temperature": 0.1, "do_sample": True, "stop_strings": "END"}, seed=5)
    assert got == Sampling(max_new_tokens=7, temperature=0.1, do_sample=True, stop=("END",), seed=5)


def test_overrides_win_and_leave_the_section_alone():
    section = {"max_new_tokens": 7, "temperature": 0.5, "do_sample": True}
    got = resolve(section, {"max_new_tokens": 9, "typical_p": 0.9})
    assert (got.max_new_tokens, got.extra) == (9, {"typical_p": 0.9})
    assert section == {"max_new_tokens": 7, "temperature": 0.5, "do_sample": True}


def test_temperature_zero_is_greedy():
    assert not resolve({"temperature": 0, "do_sample": True}).do_sample


def test_an_overriding_temperature_means_sampling():
    assert resolve({"do_sample": False}, {"temperature": 0.7}).do_sample
    assert not resolve({"do_sample": False}, {"temperature": 0.7, "do_sample": False}).do_sample


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ({"max_new_token": 3}, "config-unknown-key"),
        ({"num_return_sequences": 2}, "config-conflict"),  # greedy: both would be the same
        ({"n": 3, "num_beams": 2}, "config-conflict"),
        ({"n": 0}, "config-bad-value"),
        ({"logprobs": True, "num_beams": 2}, "config-conflict"),
        ({"logprobs": True, "guidance_scale": 1.5}, "config-conflict"),
        ({"presence_penalty": 3}, "config-bad-value"),
        ({"frequency_penalty": "much"}, "config-bad-value"),
        ({"output_scores": True}, "config-not-implemented"),
        ({"streaming": True}, "config-not-implemented"),
        ({"max_new_tokens": 0}, "config-bad-value"),
        ({"temperature": -1}, "config-bad-value"),
        ({"top_p": 0}, "config-bad-value"),
        ({"do_sample": "often"}, "config-bad-value"),
        ({"stop": [""]}, "config-bad-value"),
        ({"min_new_tokens": 300}, "config-conflict"),
    ],
)
def test_refusals(overrides, code):
    with pytest.raises(ConfigError) as caught:
        resolve(None, overrides)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "wrong",
    [
        {"typical_p": 2.0},
        {"min_p": 5},
        {"epsilon_cutoff": -1},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": "x"},
        {"exponential_decay_length_penalty": 5},
        {"exponential_decay_length_penalty": [2, "x"]},
        {"choices": []},
        {"logit_bias": {"8": "much"}},
        {"logit_bias": 3},
        {"bad_words": [3]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[-1]]},
        {"suppress_tokens": [-1]},
        {"suppress_tokens": 3},
        {"begin_suppress_tokens": ["x"]},
        {"forced_bos_token_id": -1},
        {"forced_eos_token_id": "end"},
        {"guidance_scale": 0},
        {"max_time": 0},
        {"use_cache": 7},
        {"early_stopping": "never"},
        {"schema": 3},
        {"stop": [""]},
        {"temprature": 1},
    ],
    ids=repr,
)
def test_a_caller_is_told_what_a_config_is(wrong):
    from luthier.config import load

    with pytest.raises(ConfigError) as caught:
        resolve(None, wrong)
    with pytest.raises(ConfigError) as in_yaml:
        load({"base_model": "x", "generation": wrong})
    (here,), (there,) = caught.value.faults, in_yaml.value.faults
    assert here.code == there.code and here.received == there.received
    assert here.message == there.message.replace("generation.", "", 1)
    if here.code == "config-bad-value":
        assert here.allowed == there.allowed
    assert there.where.replace("config generation.", "generation_config ", 1) == here.where


def test_the_engine_is_chosen_at_load_and_is_not_offered_for_a_call() -> None:
    with pytest.raises(ConfigError, match="chosen when the model is loaded, not for one call") as caught:
        resolve(None, {"engine": "vllm"})
    fault = caught.value.faults[0]
    assert (
        fault.where == "generation_config engine" and "config.yaml" in str(fault.allowed) and "--set" in str(fault.fix)
    )
    with pytest.raises(ConfigError) as caught:
        resolve(None, {"temprature": 1})
    assert "temperature" in caught.value.faults[0].allowed and "engine" not in caught.value.faults[0].allowed


@pytest.mark.parametrize("wrong", [{"max_length": 0}, {"min_length": -1}, {"sequence_bias": [[[], 1.0]]}])
def test_what_only_a_caller_may_give_is_checked_too(wrong):
    with pytest.raises(ConfigError) as caught:
        resolve(None, wrong)
    assert caught.value.code == "config-bad-value"


def test_values_have_the_types_that_the_config_declares():
    got = resolve(None, {"max_new_tokens": "7", "bad_words_ids": [[1, "2"]], "sequence_bias": {(3, 4): 1}})
    assert (got.max_new_tokens, got.extra) == (7, {"bad_words_ids": ((1, 2),), "sequence_bias": (((3, 4), 1.0),)})


@pytest.mark.parametrize(
    "named",
    [
        {"forced_bos_token_id": 9},
        {"forced_eos_token_id": 9},
        {"suppress_tokens": [1, 9]},
        {"begin_suppress_tokens": [9]},
        {"bad_words_ids": [[1], [2, 9]]},
        {"sequence_bias": {(1, 9): 1.0}},
        {"logit_bias": {"9": 1.0}},
        {"bad_words": "ninechars"},
    ],
    ids=repr,
)
def test_ids_beyond_the_vocabulary_are_refused_by_their_key(named):
    for section, overrides in ((None, named), (named, None)):
        with pytest.raises(ConfigError) as caught:
            resolve(section, overrides, tokenizer=Words(), vocabulary=9)
        (fault,) = caught.value.faults
        assert (fault.code, fault.where) == ("config-bad-value", f"generation.{next(iter(named))}")
        assert (fault.received, fault.allowed) == (9, "0 to 8")
    assert resolve(None, named, tokenizer=Words(), vocabulary=11).extra.keys() == named.keys()


def test_all_faults_at_once_with_a_suggestion():
    with pytest.raises(ConfigError) as caught:
        resolve({"top_k": -1}, {"temprature": 1})
    assert {f.code for f in caught.value.faults} == {"config-bad-value", "config-unknown-key"}
    assert "temperature" in str(caught.value)


def test_a_caller_who_asks_for_sampling_gets_it_from_a_greedy_config():
    got = resolve({"temperature": 0.0, "do_sample": False}, {"do_sample": True})
    assert (got.do_sample, got.temperature) == (True, 1.0)
    got = resolve({"temperature": 0.0, "do_sample": False}, {"top_p": 0.9})
    assert (got.do_sample, got.temperature, got.top_p) == (True, 1.0, 0.9)
    assert not resolve({"temperature": 0.7, "do_sample": True}, {"temperature": 0}).do_sample


def test_the_configs_section_is_taken_whole():
    from luthier.config.generation import Generation

    assert resolve(Generation()) == Sampling(extra={"use_cache": True})
    got = resolve(Generation(temperature=0.5, no_repeat_ngram_size=3), seed=9)
    assert (got.do_sample, got.temperature, got.seed, got.extra["no_repeat_ngram_size"]) == (True, 0.5, 9, 3)


class Words:
    """A tokenizer of which each word with the space before it is a token, by its length."""

    def encode(self, text, *, controls=False, continuation=False):
        assert continuation
        return [len(word) for word in text.replace(" ", "\n ").split("\n") if word]


def test_texts_become_tokens_or_an_error_that_says_why():
    got = resolve({"logit_bias": {"7": 1, "three": -2.5, 9: 3}, "bad_words": ["no", "no way"]}, tokenizer=Words())
    assert got.extra["logit_bias"] == ((5, -2.5), (7, 1.0), (9, 3.0))
    assert banned_ids(got.extra) == [[2], [3], [2, 4], [3, 4]]
    assert [text for text, _ in got.extra["bad_words"]] == ["no", "no way"]
    with pytest.raises(ConfigError) as caught:
        resolve(
            None,
            {"logit_bias": {"two words": 1.0, "7": 101, "": 1.0}, "bad_words": [" "]},
            tokenizer=Words(),
        )
    faults = {fault.where.rpartition("generation.")[2]: fault for fault in caught.value.faults}
    assert set(faults) == {"logit_bias.two words", "logit_bias.7", "logit_bias.", "bad_words"}
    assert "2 tokens" in faults["logit_bias.two words"].message
    assert "3, 6" in faults["logit_bias.two words"].fix


def test_ids_and_texts_of_one_token_add_up():
    named = {"logit_bias": {"5": 1.0, "three": 2.0}, "bad_words_ids": [[1]], "bad_words": "no"}
    got = resolve(None, named, tokenizer=Words())
    assert got.extra["logit_bias"] == ((5, 3.0),)
    assert banned_ids(got.extra) == [[1], [2], [3]]


def test_the_section_has_the_keys_too():
    from luthier.config.generation import Generation

    section = Generation(num_return_sequences=2, temperature=0.5, logit_bias={5: 1}, bad_words="no", logprobs=True)
    got = resolve(section, tokenizer=Words())
    assert (got.n, got.logprobs, got.extra["logit_bias"]) == (2, True, ((5, 1.0),))
    assert banned_ids(got.extra) == [[2], [3]]


@pytest.mark.parametrize(
    ("section", "overrides", "told"),
    [
        ({"do_sample": False, "top_p": 0.9}, None, ["top_p"]),
        ({"do_sample": False, "temperature": 0.7, "min_p": 0.1, "top_k": 5}, None, ["temperature", "top_k", "min_p"]),
        ({"length_penalty": 2.0}, None, ["length_penalty"]),
        ({"length_penalty": 2.0, "early_stopping": True, "num_beams": 2}, None, []),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, None, []),
        ({"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "length_penalty": 1.0}, None, []),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0}, []),  # wished so by the caller
        ({"do_sample": False}, {"top_p": 0.9}, []),  # means sampling
        ({}, {"top_p": 0.9, "do_sample": False}, ["top_p"]),
        ({"do_sample": False, "top_p": 0.9}, {"early_stopping": True}, ["early_stopping"]),
    ],
)
def test_keys_without_effect_beside_the_others_are_named(section, overrides, told):
    lines = idle(section, overrides)
    assert [line.split(":")[0].removeprefix("generation.") for line in lines] == told
    assert all("has no effect" in line for line in lines)
