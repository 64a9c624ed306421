"""From the `generation:` section and a caller's overrides to one frozen `Sampling`. No torch, no transformers.

Every key is honoured or refused: a key that does nothing here is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.errors import ConfigError, Fault, missing_extra
from luthier.infer.grammar import KINDS, fault_of
from luthier.infer.words import Encodes, banned, biases
from luthier.registry import nearest
from luthier.types import Sampling

# Settings that transformers' generate understands and that pass through `Sampling.extra` unchanged.
PASSED_ON: frozenset[str] = frozenset(
    {
        "bad_words",
        "bad_words_ids",
        "choices",
        "begin_suppress_tokens",
        "early_stopping",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "logit_bias",
        "max_length",
        "max_time",
        "min_length",
        "min_p",
        "no_repeat_ngram_size",
        "regex",
        "remove_invalid_values",
        "renormalize_logits",
        "schema",
        "sequence_bias",
        "suppress_tokens",
        "typical_p",
        "use_cache",
    }
)
OWN: tuple[str, ...] = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "n",
    "logprobs",
)
ALIASES: Mapping[str, str] = {
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "n",
}

# Keys of Ludwig's section that only describe a value Luthier already has: refused unless they say exactly that.
FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beam_groups": ((None, 1), "diverse beam search left transformers; use num_beams alone"),
    "diversity_penalty": ((None, 0, 0.0), "diverse beam search left transformers; use num_beams alone"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search left transformers; use top_p or min_p"),
    "output_scores": ((None, False), "ask for logprobs instead"),
    "output_attentions": ((None, False), "predictions carry no attentions; leave the key out"),
    "output_hidden_states": ((None, False), "predictions carry no hidden states; leave the key out"),
    "return_dict_in_generate": ((None, False, True), "results have one shape; leave the key out"),
    "pad_token_id": ((None,), "padding is the tokenizer's business; leave the key out"),
    "bos_token_id": ((None,), "prompts are made of ids already; leave the key out"),
    "eos_token_id": ((None,), "the tokenizer says what ends a turn; use `stop` for more"),
    "engine": ((None,), "it is chosen when the model is loaded: set generation.engine in the config, or by --set"),
    "force_words_ids": ((None,), "constrained beam search left transformers; leave the key out"),
    "prompt_lookup_num_tokens": ((None,), "speculative decoding changes no answer; leave the key out"),
}

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RULES: Mapping[str, tuple[Check, str]] = {
    "max_new_tokens": (lambda v: _whole(v) and v >= 1, "an integer of at least 1"),
    "min_new_tokens": (lambda v: _whole(v) and v >= 0, "an integer of at least 0"),
    "do_sample": (lambda v: isinstance(v, bool), "true or false"),
    "temperature": (lambda v: _number(v) and 0 <= v < float("inf"), "a number of at least 0; 0 is greedy"),
    "top_k": (lambda v: _whole(v) and v >= 0, "an integer of at least 0; 0 is off"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number over 0 and at most 1; 1 is off"),
    "num_beams": (lambda v: _whole(v) and v >= 1, "an integer of at least 1"),
    "repetition_penalty": (lambda v: _number(v) and 0 < v < float("inf"), "a number over 0; 1 is off"),
    "presence_penalty": (lambda v: _number(v) and -2 <= v <= 2, "a number from -2 to 2; 0 is off"),
    "frequency_penalty": (lambda v: _number(v) and -2 <= v <= 2, "a number from -2 to 2; 0 is off"),
    "stop": (lambda v: all(isinstance(s, str) and s for s in v), "a list of texts that are not empty"),
    "seed": (_whole, "an integer"),
    "n": (lambda v: _whole(v) and 1 <= v <= 256, "an integer from 1 to 256"),
    "logprobs": (lambda v: isinstance(v, bool), "true or false"),
}


def resolve(
    section: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    tokenizer: Encodes | None = None,
) -> Sampling:
    """The settings of one prediction: the config's section, then ``overrides`` on top of it.

    Args:
        section: the config's `generation` section (a pydantic model), a mapping, or None for the defaults.
        overrides: a caller's `generation_config`; a key set to None takes the default.
        seed: the seed of sampled answers where neither names one (the config's `random_seed`).
        tokenizer: makes tokens of the texts in `logit_bias` and `bad_words`; without it there may be none.

    Raises:
        ConfigError: a key that is unknown (config-unknown-key), refused (config-not-implemented) or out of range.
    """
    given: dict[str, tuple[Any, str]] = {}
    for where, source in (("generation", _mapping(section)), ("generation_config", dict(overrides or {}))):
        for name, value in source.items():
            given[ALIASES.get(name, name)] = (value, f"{where}.{name}")
    _sampling_implied(given, overrides or {})
    faults: list[Fault] = []
    own: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, (value, where) in given.items():
        fault = _take(name, value, where, own, extra)
        if fault:
            faults.append(fault)
    faults += _constraint_faults(own, extra) + _conflicts(own, extra)
    if tokenizer is not None:
        faults += _tokenised(extra, tokenizer)
    if faults:
        raise ConfigError(faults)
    return _settled(own, extra, seed)


def _tokenised(extra: dict[str, Any], tokenizer: Encodes) -> list[Fault]:
    """Put ids in the place of texts; what is wrong with these."""
    faults: list[Fault] = []
    if extra.get("logit_bias") is not None:
        extra["logit_bias"], wrong = biases(extra["logit_bias"], tokenizer, "generation.logit_bias")
        faults += wrong
    if extra.get("bad_words") is not None:
        extra["bad_words"], wrong = banned(extra["bad_words"], tokenizer, "generation.bad_words")
        faults += wrong
    return faults


def _conflicts(own: Mapping[str, Any], extra: Mapping[str, Any]) -> list[Fault]:
    """Settings of which one would have no effect beside the other."""
    count, beams = own.get("n", 1), own.get("num_beams", 1)
    greedy = own.get("do_sample") is not True or own.get("temperature") == 0
    faults = []
    if count > 1 and beams == 1 and greedy:
        fix = "set a temperature over 0, or num_beams to as many"
        message = "greedy answers to one prompt are all the same"
        faults.append(Fault("config-conflict", message, "generation.n", count, "1", fix))
    if beams > 1 and count > beams:
        most = f"at most num_beams ({beams})"
        faults.append(Fault("config-conflict", "n is larger than num_beams", "generation.n", count, most))
    guided = extra.get("guidance_scale") not in (None, 1, 1.0)
    if own.get("logprobs") and (beams > 1 or guided):
        other = "guidance_scale" if guided else "num_beams"
        message, fix = f"log-probabilities of tokens are not known with {other}", f"leave out {other}, or logprobs"
        faults.append(Fault("config-conflict", message, "generation.logprobs", True, fix=fix))
    return faults


def _constraint_faults(own: Mapping[str, Any], extra: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with a schema, a regular expression or choices, found before anything is generated.

    Raises DependencyError without the library that follows them.
    """
    given = [kind for kind in KINDS if extra.get(kind) is not None]
    if not given:
        return []
    where = f"generation.{given[0]}"
    if len(given) > 1:
        return [Fault("config-conflict", "an answer follows one constraint", where, given, fix="leave one of them")]
    if own.get("num_beams", 1) > 1:
        return [Fault("config-conflict", "a constrained answer is made by one beam", where, fix="leave out num_beams")]
    try:
        wrong = fault_of(extra)
    except ImportError as error:
        raise missing_extra("llguidance", "constrain", where) from error
    if wrong:
        return [Fault("config-bad-value", f"this {given[0]} cannot be followed: {wrong}", where, extra[given[0]])]
    return []


def _sampling_implied(given: dict[str, tuple[Any, str]], overrides: Mapping[str, Any]) -> None:
    """A caller who names a temperature or a filter wants sampling; greedy decoding would drop it without a word."""
    named = any(overrides.get(name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"))
    if named and overrides.get("do_sample") is None:
        given["do_sample"] = (True, "generation_config.do_sample")
    # The config's temperature 0 only says that the config is greedy; it does not undo a caller who asks for sampling.
    if given.get("do_sample", (False, ""))[0] is True and overrides.get("temperature") is None:
        asked = named or overrides.get("do_sample") is True
        if asked and given.get("temperature", (1.0, ""))[0] == 0:
            given["temperature"] = (1.0, "generation_config.temperature")


def _mapping(section: Any) -> dict[str, Any]:
    if section is None:
        return {}
    found: dict[str, Any] = dict(section) if isinstance(section, Mapping) else section.model_dump()
    return {name: value for name, value in found.items() if name != "engine"}  # chosen when the model is loaded


def _take(name: str, value: Any, where: str, own: dict[str, Any], extra: dict[str, Any]) -> Fault | None:
    """Put one key where it belongs, or say what is wrong with it."""
    if name in FIXED:
        allowed, advice = FIXED[name]
        if value in allowed:
            return None
        return Fault("config-not-implemented", f"{name} is not used by Luthier", where, value, fix=advice)
    if name not in OWN and name not in PASSED_ON:
        close = nearest(name, [*OWN, *PASSED_ON])
        fix = f"did you mean {close!r}?" if close else None
        return Fault("config-unknown-key", f"there is no generation setting {name!r}", where, value, _known(), fix)
    if value is None:
        return None
    if name in PASSED_ON:
        extra[name] = value
        return None
    if name == "stop":
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,)
    check, allowed_text = _RULES[name]
    if not check(value):
        return Fault("config-bad-value", f"{name} cannot have this value", where, value, allowed_text)
    own[name] = value
    return None


def _known() -> list[str]:
    return sorted([*OWN, *PASSED_ON])


def _settled(own: dict[str, Any], extra: dict[str, Any], seed: int | None) -> Sampling:
    """Settle what depends on several keys: temperature 0 is greedy, lengths agree, the seed falls back."""
    if own.get("temperature") == 0:  # the config itself refuses to hold both, an override may ask for greedy
        own |= {"do_sample": False, "temperature": 1.0}
    own.setdefault("seed", seed)
    sampling = Sampling(**own, extra=extra)
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ConfigError(
            "config-conflict",
            "min_new_tokens is larger than max_new_tokens",
            where="generation.min_new_tokens",
            received=sampling.min_new_tokens,
            allowed=f"at most max_new_tokens ({sampling.max_new_tokens})",
        )
    return sampling
