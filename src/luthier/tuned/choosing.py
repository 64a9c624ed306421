"""Answers that are a choice: the model scores every class after the prompt, and the most probable one is the answer.

Nothing is generated. What is scored is what training supervised: the class and the end of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import ConfigError
from luthier.infer.sampling import BEAMED, DRAWN
from luthier.tuned.reading import Reader
from luthier.types import Completion, Example, Request, Sampling

if TYPE_CHECKING:
    from luthier.model.tunable import Tunable

Scored = tuple[Completion, tuple[float, ...]]  # an answer and its log-probabilities: each class's, or each token's
NO_EFFECT = ("use_cache",)  # settings that change no answer


class Writes(Protocol):
    """What is asked of `data.render.Renderer`."""

    def answer_ids(self, row: Mapping[str, Any], answer: str) -> list[int]:
        """The ids that training supervises for an answer."""
        ...


@dataclass(frozen=True)
class Choices:
    """The texts that an answer may be, and the ids of each, its end included."""

    texts: tuple[str, ...]
    endings: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, renderer: Writes, row: Mapping[str, Any], texts: Sequence[str]) -> Choices:
        """As training would write them after ``row``; which row it is does not matter."""
        return cls(tuple(texts), tuple(tuple(renderer.answer_ids(row, text)) for text in texts))

    def completion(self, request: Request, scores: Sequence[float]) -> Completion:
        """The likeliest one as the answer to ``request``; whole, whatever its `max_new_tokens`."""
        best = max(range(len(scores)), key=scores.__getitem__)
        return Completion(request.key, self.endings[best], self.texts[best], "stop")

    def refusal(self, request: Request, context: int | None) -> str | None:
        """Why a request cannot be answered, or None."""
        prompt, longest = len(request.prompt_ids), max(map(len, self.endings))
        if context is not None and prompt + longest > context:
            return (
                f"the prompt has {prompt} tokens and the longest class {longest}: "
                f"more than the model's context of {context}"
            )
        return None


def is_choice(sampling: Sampling, texts: Sequence[str]) -> bool:
    """Whether these settings ask for nothing but the likeliest class: no draw, no penalty, no rule of any kind."""
    if sampling.do_sample or any(stop in text for stop in sampling.stop for text in texts):
        return False
    if any(value is not None for name, value in sampling.extra.items() if name not in NO_EFFECT):
        return False
    plain = Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    same = replace(sampling, max_new_tokens=plain.max_new_tokens, stop=(), seed=None, extra={})
    return same == plain


def searched(sampling: Sampling, texts: Sequence[str]) -> Sampling:
    """Settings of beam search as those of a choice among ``texts``: what beams look for, scoring all of them finds.

    Raises ConfigError config-conflict beside settings that move or add answers.
    """
    if sampling.num_beams == 1:
        return sampling
    alone = {name: value for name, value in sampling.extra.items() if name not in (*BEAMED, *DRAWN)}
    found = replace(sampling, num_beams=1, do_sample=False, temperature=1.0, top_k=0, top_p=1.0, extra=alone)
    if is_choice(found, texts):
        return found
    raise ConfigError(
        "config-conflict",
        "beams hold no answer to the classes beside settings that change scores, stop answers or ask for several",
        where="generation.num_beams",
        received=sampling.num_beams,
        allowed="1, or beams with none of these",
        fix="leave num_beams out, or set `constrained: false` on the output for answers of free text",
    )


def told_of_beams(reader: Reader | None, sampling: Sampling) -> list[str]:
    """What to tell of beams where answers are held to classes. Raises ConfigError as `searched`."""
    if reader is None or reader.choices is None or searched(sampling, reader.choices) is sampling:
        return []
    return [f"generation.num_beams: {sampling.num_beams} has no effect: every class is scored, and the likeliest taken"]


def chosen(model: Tunable, choices: Choices, requests: Sequence[Request]) -> Iterator[Scored]:
    """The answer to each request with each class's log-probability (none: it cannot be answered), in any order."""
    from luthier.infer.score import choice_scores

    able = []
    for request in requests:
        fault = choices.refusal(request, model.base.spec.context)
        if fault is None:
            able.append(request)
        else:
            yield Completion(request.key, (), "", "error", error=fault), ()
    for at, scores in choice_scores(model, [one.prompt_ids for one in able], choices.endings):
        yield choices.completion(able[at], scores) if scores else _too_large(able[at]), scores


def _too_large(request: Request) -> Completion:
    return Completion(request.key, (), "", "error", error="out of memory for this row alone; shorten it")


def scored(
    model: Tunable, choices: Choices | None, requests: Sequence[Request], done: Sequence[Completion]
) -> Iterator[Scored]:
    """Generated answers, each with the log-probability of every class or, without ``choices``, of its own tokens.

    Both are the model's own, before temperature and filters; () of an answer that memory does not hold with its prompt.
    """
    from luthier.infer.score import choice_scores, logprobs_of

    prompts = {request.key: request.prompt_ids for request in requests}
    able = [one for one in done if one.finish_reason != "error"]
    yield from ((one, ()) for one in done if one.finish_reason == "error")
    if choices is not None:
        for at, scores in choice_scores(model, [prompts[one.key] for one in able], choices.endings):
            yield able[at], scores
        return
    examples = []
    for one in able:
        before = len(prompts[one.key])
        examples.append(Example([*prompts[one.key], *one.ids], [0.0] * before + [1.0] * len(one.ids), one.key))
    yield from ((one, tuple(values)) for one, values in zip(able, logprobs_of(model, examples), strict=True))
