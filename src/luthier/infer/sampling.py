"""From the `generation:` section and a caller's overrides to one frozen `Sampling`. No torch, no transformers.

Every key is honoured or refused: one that Luthier does not have is an error, and `idle` names those that have no effect
beside the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from luthier.config.faults import Places, from_validation
from luthier.config.generation import Overrides
from luthier.errors import ConfigError, Fault, missing_extra
from luthier.infer.grammar import KINDS, fault_of
from luthier.infer.words import Encodes, banned, beyond, biases
from luthier.types import Sampling

OWN = frozenset(one.name for one in fields(Sampling)) - {"extra"}  # the other keys pass through `Sampling.extra`
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
    "force_words_ids": ((None,), "constrained beam search left transformers; leave the key out"),
    "streaming": ((None, False), "call Model.stream, or LudwigModel.generate(streaming=True)"),
    "prompt_lookup_num_tokens": ((None,), "speculative decoding changes no answer; leave the key out"),
}
# Keys that only a draw, or only beam search, reads: with the values under which each would do nothing there either.
DRAWN: Mapping[str, tuple[Any, ...]] = {
    "temperature": (0, 1),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
BEAMED: Mapping[str, tuple[Any, ...]] = {"early_stopping": (False,), "length_penalty": (1,)}
CONSTRAINTS = {  # what each may be
    "schema": "a JSON Schema, with the words that docs/howto/generation.md names",
    "regex": "a regular expression without looks around and references back",
    "choices": "a list of texts that are not empty",
}


def resolve(
    section: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    tokenizer: Encodes | None = None,
    vocabulary: int | None = None,
) -> Sampling:
    """The settings of one prediction: the config's section, then ``overrides`` on top of it.

    Args:
        section: the config's `generation` section (a pydantic model), a mapping, or None for the defaults.
        overrides: a caller's `generation_config`; a key set to None takes the default.
        seed: the seed of sampled answers where neither names one (the config's `random_seed`).
        tokenizer: makes tokens of the texts in `logit_bias` and `bad_words`; without it there may be none.
        vocabulary: how many tokens the model has; None or 0: not known, and ids are not checked against it.

    Raises:
        ConfigError: a key that is unknown (config-unknown-key), refused (config-not-implemented), out of range or
            naming a token that the model lacks (config-bad-value), or in vain beside another (config-conflict).
    """
    given, faults = _checked(_mapping(section), "generation")
    asked, wrong = _checked(overrides or {}, "generation_config")
    if faults or wrong:
        raise ConfigError(faults + wrong)
    given |= asked
    _sampling_implied(given, asked)
    own = {name: value for name, value in given.items() if name in OWN and value is not None}
    extra = {name: value for name, value in given.items() if name not in OWN and value is not None}
    faults = _constraint_faults(own, extra) + _conflicts(own, extra)
    if tokenizer is not None:
        faults += _tokenised(extra, tokenizer)
    if vocabulary:
        faults += beyond(extra, vocabulary)
    if faults:
        raise ConfigError(faults)
    return _settled(own, extra, seed)


def idle(section: Any, overrides: Mapping[str, Any] | None = None) -> list[str]:
    """What to tell of keys that have no effect beside the others: filters of a greedy answer, penalties without beams.

    Of the section's keys, or of the overrides alone where there are any: a section's key that an override puts out of
    effect is what the caller wished. Arguments are those of `resolve`.
    """
    given, asked = _checked(_mapping(section), "generation")[0], _checked(overrides or {}, "generation_config")[0]
    settled = given | asked
    _sampling_implied(settled, asked)
    said = settled if overrides is None else asked
    out = []
    if not settled.get("do_sample") or settled.get("temperature") == 0:
        out += [(name, "answers are greedy (do_sample is false)") for name in _set(said, DRAWN)]
    if (settled.get("num_beams") or 1) == 1:
        out += [(name, "there is one beam (num_beams is 1)") for name in _set(said, BEAMED)]
    return [f"generation.{name}: {said[name]} has no effect: {why}" for name, why in out]


def _set(said: Mapping[str, Any], keys: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Those of ``keys`` that are said, other than in a word that switches them off."""
    return [name for name, off in keys.items() if said.get(name) is not None and said[name] not in off]


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
        fix = "lower n, or raise num_beams"
        faults.append(Fault("config-conflict", "n is larger than num_beams", "generation.n", count, most, fix))
    guided = extra.get("guidance_scale") not in (None, 1, 1.0)
    if own.get("logprobs") and (beams > 1 or guided):
        other = "guidance_scale" if guided else "num_beams"
        message, fix = f"log-probabilities of tokens are not known with {other}", f"leave out {other}, or logprobs"
        allowed = f"logprobs without {other}"
        faults.append(Fault("config-conflict", message, "generation.logprobs", True, allowed, fix))
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
        allowed, fix = f"one of {', '.join(given)}", "leave one of them"
        return [Fault("config-conflict", "an answer follows one constraint", where, given, allowed, fix)]
    if (beams := own.get("num_beams", 1)) > 1:
        message, received = "a constrained answer is made by one beam", f"{given[0]}, num_beams: {beams}"
        return [Fault("config-conflict", message, where, received, "num_beams: 1", "leave out num_beams")]
    try:
        wrong = fault_of(extra)
    except ImportError as error:
        raise missing_extra("llguidance", "constrain", where) from error
    if wrong:
        message, fix = f"this {given[0]} cannot be followed: {wrong}", "write it without that, or leave it out"
        return [Fault("config-bad-value", message, where, extra[given[0]], CONSTRAINTS[given[0]], fix)]
    return []


def _sampling_implied(given: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """A caller who names a temperature or a filter wants sampling; greedy decoding would drop it without a word."""
    named = any(asked.get(name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"))
    if named and asked.get("do_sample") is None:
        given["do_sample"] = True
    # The config's temperature 0 only says that the config is greedy; it does not undo a caller who asks for sampling.
    drawn = given.get("do_sample") and (named or asked.get("do_sample"))
    if drawn and given.get("temperature") == 0 and asked.get("temperature") is None:
        given["temperature"] = 1.0


def _mapping(section: Any) -> dict[str, Any]:
    if section is None:
        return {}
    found: dict[str, Any] = dict(section) if isinstance(section, Mapping) else section.model_dump()
    return {name: value for name, value in found.items() if name != "engine"}  # chosen when the model is loaded


def _checked(source: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Fault]]:
    """What one source says, each value of the type that the config declares for it; and what is wrong with it."""
    named = {ALIASES.get(name, name): value for name, value in source.items()}
    faults = [
        Fault(
            "config-not-implemented",
            f"{name} is not used by Luthier",
            f"{where} {name}",
            named[name],
            list(allowed),
            advice,
        )
        for name, (allowed, advice) in FIXED.items()
        if name in named and named[name] not in allowed
    ]
    if (engine := named.pop("engine", None)) is not None:
        message = "the engine is chosen when the model is loaded, not for one call"
        allowed, fix = "generation.engine in the run's config.yaml", "set it there, or on the command line by --set"
        faults.append(Fault("config-conflict", message, f"{where} engine", engine, allowed, fix))
    free = {name: value for name, value in named.items() if name not in FIXED}
    said = {name: value for name, value in free.items() if value is not None}
    try:
        values = Overrides.model_validate(said)
    except ValidationError as error:
        return {}, faults + from_validation(error, said, Places(where), Overrides)
    return {name: getattr(values, name) if name in said else None for name in free}, faults


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
