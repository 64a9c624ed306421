"""The `generation:` section: how answers are drawn. The keys are those of transformers' GenerationConfig."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from luthier.config.section import Conflict, Float, Int, Section, key, read_bool

# pydantic warns that `schema` hides a method of its own, which it has given up.
warnings.filterwarnings("ignore", message='Field name "schema" in "GenerationKeys" shadows', category=UserWarning)


def _listed(value: Any) -> Any:
    """One text stands for a list of it."""
    return [value] if isinstance(value, str) else value


def _named(value: Any) -> Any:
    """YAML's keys are text, Python's may be numbers."""
    return {str(token): bias for token, bias in value.items()} if isinstance(value, Mapping) else value


def _paired(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


DRAWS = "It turns drawing on where neither do_sample nor temperature is given."
Token = Annotated[Int, Field(ge=0)]
Tokens = Annotated[tuple[Token, ...], Field(min_length=1)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]


class GenerationKeys(Section):
    """The keys that a caller may put others on top of, each by itself: in both places it may hold the same."""

    max_new_tokens: Int = key(256, "Longest answer in tokens.", ludwig=32, why="32 tokens cut most answers", ge=1)
    min_new_tokens: Int = key(0, "Shortest answer in tokens.", ge=0)
    do_sample: bool = key(
        False,
        "Draw at random; off is greedy. Left out, it is turned on by a temperature over 0 and, where no temperature is "
        "given, by top_k, top_p, min_p or typical_p.",
        ludwig=True,
        why="greedy answers can be repeated and compared",
    )
    temperature: Float = key(
        0.0,
        "Sharpness of the draw: 0 is greedy, 1 the model's own distribution. Over 0 it turns drawing on, unless "
        "do_sample is false; left out of a draw it is 1.",
        ludwig=0.1,
        ge=0,
        le=100,
    )
    top_k: Int = key(0, f"Draw from the k likeliest tokens; 0 is off. {DRAWS}", ludwig=50, ge=0)
    top_p: Float = key(1.0, f"Draw from the likeliest tokens that hold this share; 1 is off. {DRAWS}", gt=0, le=1)
    min_p: Float | None = key(None, f"Leave out tokens under this share of the likeliest one. {DRAWS}", ge=0, le=1)
    typical_p: Float | None = key(None, f"Share kept by locally typical sampling; 1 is off. {DRAWS}", gt=0, le=1)
    epsilon_cutoff: Float | None = key(None, "Leave out tokens under this probability.", ge=0, lt=1)
    eta_cutoff: Float | None = key(None, "Cutoff of eta sampling.", ge=0, lt=1)
    num_beams: Int = key(1, "Beams of beam search; 1 is off.", ge=1)
    early_stopping: bool | None = key(None, "Beam search stops when as many answers as beams are complete.")
    length_penalty: Float | None = key(None, "Exponent on the length in beam search; over 0 favours long answers.")
    repetition_penalty: Float = key(1.0, "Divides the scores of tokens already seen; 1 is off.", gt=0)
    presence_penalty: Float = key(
        0.0, "Taken from the scores of tokens that the answer already holds, once for each such token.", ge=-2, le=2
    )
    frequency_penalty: Float = key(
        0.0, "Taken from the scores of tokens as often as the answer already holds them.", ge=-2, le=2
    )
    encoder_repetition_penalty: Float | None = key(None, "Favours tokens of the prompt; 1 is off.", gt=0)
    no_repeat_ngram_size: Int | None = key(None, "No run of this many tokens occurs twice.", ge=0)
    exponential_decay_length_penalty: tuple[Int, Float] | None = key(
        None, "After the first number of tokens the end grows likelier by the second, token by token."
    )
    logit_bias: Annotated[dict[str, Float], BeforeValidator(_named)] | None = key(
        None, "Added to the scores of tokens: a token's id, or a text that is one token, to a number from -100 to 100."
    )
    bad_words: Texts | None = key(
        None, "Texts whose tokens are never generated, at the beginning of a word or after a space."
    )
    bad_words_ids: tuple[Tokens, ...] | None = key(None, "Token sequences that are never generated.")
    suppress_tokens: tuple[Token, ...] | None = key(None, "Tokens that are never generated.")
    begin_suppress_tokens: tuple[Token, ...] | None = key(None, "Tokens that never begin an answer.")
    forced_bos_token_id: Int | None = key(None, "Token that every answer begins with.", ge=0)
    forced_eos_token_id: Int | None = key(None, "Token put at the end of an answer that reaches its limit.", ge=0)
    renormalize_logits: bool | None = key(None, "Normalise the scores again after all filters.")
    remove_invalid_values: bool | None = key(None, "Replace scores that are not finite.")
    guidance_scale: Float | None = key(None, "Classifier-free guidance; over 1 follows the prompt more closely.", gt=0)
    max_time: Float | None = key(None, "Seconds after which an answer stops.", gt=0)
    use_cache: bool = key(True, "Keep keys and values of earlier tokens; changes speed only.")
    stop: Texts = key((), "Texts that end an answer.")
    schema: dict[str, Any] | str | None = key(  # type: ignore[assignment]  # pydantic's old method of that name
        None, "JSON Schema that every answer satisfies, as a mapping or as JSON text. Needs luthier[constrain]."
    )
    regex: str | None = key(None, "Regular expression that every answer matches whole. Needs luthier[constrain].")
    choices: tuple[str, ...] | None = key(
        None, "Texts of which every answer is one. Needs luthier[constrain].", min_length=1
    )
    seed: Int | None = key(None, "Seed of the draw; empty: random_seed.", ge=0)
    n: Int = key(
        1, "Answers to each prompt. Predictions hold all; evaluation, chat and streams take the first.", ge=1, le=256
    )
    logprobs: bool = key(
        False, "Answers carry the log-probability of each token, the model's own and that after rules and filters."
    )


class Overrides(GenerationKeys):
    """What a caller may put on top of the section: its keys, and transformers' that a config has better ones for."""

    max_length: Int | None = key(None, "Longest prompt and answer together.", ge=1)
    min_length: Int | None = key(None, "Shortest prompt and answer together.", ge=0)
    sequence_bias: Annotated[tuple[tuple[Tokens, Float], ...], BeforeValidator(_paired)] | None = key(
        None, "Added to the score of the last token of a sequence, where the others precede it."
    )


class Generation(GenerationKeys):
    """How answers are drawn at prediction."""

    engine: Literal["auto", "luthier", "transformers", "vllm"] = key(
        "auto",
        "Who answers with a finished run: Luthier's own engine where it knows the architecture, else transformers' "
        "generate (auto); one of them; or vLLM, where it is installed. It is chosen "
        "when the model is loaded, not for one call. Between steps of training it is always auto.",
    )

    @model_validator(mode="before")
    @classmethod
    def _sampling(cls, data: Any) -> Any:
        """A temperature over 0 means sampling, as in Ludwig; sampling without one uses the model's distribution."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "num_return_sequences" in data and "n" not in data:
            data["n"] = data.pop("num_return_sequences") or 1
        sampled, temperature = read_bool(data.pop("do_sample", None)), data.get("temperature")
        if sampled is None and (_over_zero(temperature) or ("temperature" not in data and _filters(data))):
            sampled = True
        if sampled is True and temperature is None:
            data["temperature"] = 1.0
        return data if sampled is None else {**data, "do_sample": sampled}

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        if self.min_new_tokens > self.max_new_tokens:
            raise Conflict(
                "min_new_tokens is larger than max_new_tokens",
                received=f"min_new_tokens: {self.min_new_tokens}, max_new_tokens: {self.max_new_tokens}",
                allowed=f"min_new_tokens of at most {self.max_new_tokens}",
                fix="lower min_new_tokens, or raise max_new_tokens",
            )
        if self.do_sample and self.temperature == 0:
            raise Conflict(
                "do_sample is true and temperature is 0: temperature 0 is greedy",
                received="do_sample: true, temperature: 0",
                allowed="a temperature over 0 with do_sample: true",
                fix="raise temperature, or set do_sample: false",
            )
        return self


def _over_zero(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) > 0
    except (TypeError, ValueError):  # told by the field's own check
        return False


def _filters(data: dict[str, Any]) -> bool:
    """Whether a filter that only sampling has was asked for."""
    shares = (data[name] for name in ("top_p", "typical_p") if _over_zero(data.get(name)))  # of which 1 is off
    return any(_over_zero(data.get(name)) for name in ("top_k", "min_p")) or any(float(one) < 1 for one in shares)
