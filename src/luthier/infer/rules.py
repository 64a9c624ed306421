"""What a request's settings do to the scores of its next token, row by row, so that rows of any length share a step.

    blocked ends (min_new_tokens) → rules on tokens seen → warpers → the draw, or the likeliest token

The rules are transformers' own processors, in the order of its `generate`; each row hands them its own ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from luthier.infer.answer import Answers
from luthier.infer.drawing import WARPERS, Constrained, Counted, First, draw, uniforms, warpers
from luthier.infer.grammar import KINDS
from luthier.infer.words import banned_ids
from luthier.types import Request, Sampling

Row = tuple[int, int, tuple[int, ...], str]  # prompt tokens, all tokens at most, ids that end an answer, device


def sequence_bias(extra: Mapping[str, Any]) -> list[Any] | None:
    """`sequence_bias` with the tokens of `logit_bias`, which are sequences of one; None where there is neither."""
    named = [(tuple(ids), float(bias)) for ids, bias in extra.get("sequence_bias") or ()]
    named += [((token,), bias) for token, bias in extra.get("logit_bias") or ()]
    total: dict[tuple[int, ...], float] = {}
    for ids, bias in named:
        total[ids] = total.get(ids, 0.0) + bias
    return [[list(ids), bias] for ids, bias in total.items()] or None


def lists(value: Any) -> Any:
    """Configs hold tuples where the processors want lists."""
    return [lists(v) for v in value] if isinstance(value, (list, tuple)) else value


# Keys of `Sampling.extra` → the processor they mean, in the order in which transformers applies them; ours come last.
RULES: Mapping[str, Callable[[Any, Row], LogitsProcessor]] = {
    "sequence_bias": lambda value, row: SequenceBiasLogitsProcessor(sequence_bias=lists(value)),
    "repetition_penalty": lambda value, row: RepetitionPenaltyLogitsProcessor(penalty=value),
    "no_repeat_ngram_size": lambda value, row: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, row: NoBadWordsLogitsProcessor(lists(value), list(row[2])),
    "min_length": lambda value, row: MinLengthLogitsProcessor(value, list(row[2]), device=row[3]),
    "forced_eos_token_id": lambda value, row: ForcedEOSTokenLogitsProcessor(row[1], value, device=row[3]),
    "remove_invalid_values": lambda value, row: InfNanRemoveLogitsProcessor(),  # type: ignore[no-untyped-call]
    "exponential_decay_length_penalty": lambda value, row: ExponentialDecayLengthPenalty(
        tuple(value), list(row[2]), row[0]
    ),
    "suppress_tokens": lambda value, row: SuppressTokensLogitsProcessor(list(value), device=row[3]),
    "begin_suppress_tokens": lambda value, row: SuppressTokensAtBeginLogitsProcessor(
        list(value), row[0], device=row[3]
    ),
    "counted": lambda value, row: Counted(value[0], value[1], row[0]),
    "forced_bos_token_id": lambda value, row: First(int(value), row[0]),
}
TOKENS = ("forced_bos_token_id", "forced_eos_token_id")  # of which 0 is one; of other keys it means off
SETTLED = ("max_length", "early_stopping", "length_penalty")  # in the row's steps; without effect on a single beam
OFF: Mapping[str, Any] = {"use_cache": True, "renormalize_logits": False, "guidance_scale": 1.0}


def unknown(sampling: Sampling) -> list[str]:
    """The settings that single-beam steps do not know; another way of generating has to serve them."""
    known = {*RULES, *WARPERS, *SETTLED, *KINDS, "logit_bias", "bad_words"}
    names = [
        name
        for name, value in sampling.extra.items()
        if name not in known and value is not None and value != OFF.get(name, ())
    ]
    return sorted(names + (["num_beams"] if sampling.num_beams > 1 else []))


class Rules:
    """One row's way from scores to a token. ``plain``: the likeliest token, whatever went before."""

    def __init__(self, request: Request, answers: Answers, device: str) -> None:
        sampling, steps = request.sampling, answers.steps(request)
        self.floor = min(sampling.min_new_tokens, steps)
        self.sampling = sampling
        self.prompt = len(request.prompt_ids)
        row = (self.prompt, self.prompt + steps, answers.ends, device)
        extra = sampling.extra
        given = {**extra, "sequence_bias": sequence_bias(extra), "bad_words_ids": banned_ids(extra)}
        if sampling.repetition_penalty != 1.0:
            given["repetition_penalty"] = float(sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            given["counted"] = (sampling.presence_penalty, sampling.frequency_penalty)
        self.processors = LogitsProcessorList(
            make(given[name], row)
            for name, make in RULES.items()
            if given.get(name) is not None and (given[name] != 0 or name in TOKENS)
        )
        path = answers.path(request)
        if path is not None:
            self.processors.append(Constrained([path], self.prompt))
        self.uniform_s = uniforms(request, steps) if sampling.do_sample else None
        self.warping = json.dumps(asdict(sampling), sort_keys=True, default=repr) if sampling.do_sample else ""

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the choice, apart from blocked ends."""
        return not self.processors and self.uniform_s is None


def choose(
    scores_rv: torch.Tensor, rows: Sequence[Rules], ids: Sequence[Sequence[int]], *, told: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[r] the next token of each row, and if ``told`` [r, v] the scores that it was chosen from.

    ``ids``: each row's prompt and answer so far. ``scores_rv``: ends blocked.
    """
    device = scores_rv.device
    if told or any(rule.processors for rule in rows):
        scores_rv = scores_rv.clone()
        for at, (rule, own) in enumerate(zip(rows, ids, strict=True)):
            if rule.processors:
                own_1t = cast(torch.LongTensor, torch.tensor([list(own)], device=device))
                scores_rv[at] = rule.processors(own_1t, scores_rv[at : at + 1])[0]
    chosen_r = scores_rv.argmax(-1)
    groups: dict[str, list[int]] = {}
    for at, rule in enumerate(rows):
        if rule.uniform_s is not None:
            groups.setdefault(rule.warping, []).append(at)
    for members in groups.values():
        index = torch.tensor(members, device=device)
        unread_r1 = cast(torch.LongTensor, index[:, None])  # warpers ask for ids and look at scores alone
        own_rv = warpers(rows[members[0]].sampling, str(device))(unread_r1, scores_rv[index])
        numbers = [float(_at(rows[at].uniform_s, len(ids[at]) - rows[at].prompt)) for at in members]
        chosen_r[index] = draw(own_rv, torch.tensor(numbers, dtype=torch.float64, device=device))
        if told:
            scores_rv[index] = own_rv
    return chosen_r, scores_rv


def _at(uniform_s: torch.Tensor | None, step: int) -> torch.Tensor:
    assert uniform_s is not None
    return uniform_s[step]
