"""Each generation key against its formula, on the engine and on the generic path: what is chosen, and how probable.

The reference computes every step anew, without a cache, from transformers' logits and the formulas written here.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from test_engine import END, PROMPTS, Letters, ask, both
from transformers import GenerationConfig

from luthier.infer.drawing import draw, uniforms
from luthier.infer.engine import DecoderEngine
from luthier.infer.generate import HfEngine
from luthier.types import Completion, Request, Sampling

NEVER = float("-inf")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["engine", "generic"])
def engine(request: pytest.FixtureRequest, pair: tuple[Any, Any]) -> Any:
    return DecoderEngine(pair[1], Letters()) if request.param == "engine" else HfEngine(pair[0], Letters())


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def kept(scores: torch.Tensor, order: torch.Tensor, share: float) -> torch.Tensor:
    """Scores of the first tokens in ``order`` that hold ``share`` of the probability together."""
    probability = scores.softmax(-1)
    total, out = 0.0, torch.full_like(scores, NEVER)
    for token in order.tolist():
        if total >= share:
            break
        out[token] = scores[token]
        total += float(probability[token])
    return out


def warped(scores: torch.Tensor, prompt: list[int], answer: list[int], sampling: Sampling) -> torch.Tensor:
    """The scores that a token is chosen from, by the definitions of the keys."""
    extra, scores = sampling.extra, scores.clone()
    for token, bias in extra.get("logit_bias", ()):
        scores[token] += bias
    for token in {*prompt, *answer}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    size, seen = extra.get("no_repeat_ngram_size", 0), [*prompt, *answer]
    for at in range(len(seen) - size + 1) if size else ():
        if size == 1 or seen[at : at + size - 1] == seen[1 - size :]:
            scores[seen[at + size - 1]] = NEVER
    for word in extra.get("bad_words_ids", ()):
        if tuple(seen[len(seen) - len(word) + 1 :]) == tuple(word[:-1]):
            scores[word[-1]] = NEVER
    if len(answer) < sampling.min_new_tokens:
        scores[END] = NEVER
    for token, count in Counter(answer).items():
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if not sampling.do_sample:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k:
        scores = torch.where(scores < scores.topk(sampling.top_k).values[-1], NEVER, scores)
    if sampling.top_p < 1:
        scores = kept(scores, scores.argsort(descending=True), sampling.top_p)
    if extra.get("min_p"):
        probability = scores.softmax(-1)
        scores = torch.where(probability < extra["min_p"] * probability.max(), NEVER, scores)
    if extra.get("typical_p", 1) < 1:
        logp = scores.log_softmax(-1)
        entropy = -(logp.exp() * logp).nansum()
        scores = kept(scores, (-logp - entropy).abs().argsort(), extra["typical_p"])
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if extra.get(name):
            probability = scores.softmax(-1)
            entropy = -(probability * scores.log_softmax(-1)).nansum()
            bound = extra[name] if name == "epsilon_cutoff" else min(extra[name], extra[name] ** 0.5 * (-entropy).exp())
            scores = torch.where((probability < bound) & (probability < probability.max()), NEVER, scores)
    return scores


def drawing(**more: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 8, "do_sample": True, "seed": 3} | more)


KEYS = {
    "greedy": Sampling(max_new_tokens=8),
    "min_new_tokens": Sampling(max_new_tokens=8, min_new_tokens=8),
    "repetition_penalty": Sampling(max_new_tokens=8, repetition_penalty=1.7),
    "presence_penalty": Sampling(max_new_tokens=8, presence_penalty=1.3),
    "frequency_penalty": Sampling(max_new_tokens=8, frequency_penalty=0.9),
    "rewards": Sampling(max_new_tokens=8, presence_penalty=-1.5, frequency_penalty=-0.4),
    "no_repeat_ngram_size": Sampling(max_new_tokens=8, extra={"no_repeat_ngram_size": 2}),
    "logit_bias": Sampling(max_new_tokens=8, extra={"logit_bias": ((7, 4.0), (40, -100.0))}),
    "bad_words_ids": Sampling(max_new_tokens=8, extra={"bad_words_ids": ((13,), (40, 41))}),
    "sampled": drawing(),
    "temperature": drawing(temperature=0.6),
    "top_k": drawing(top_k=5),
    "top_p": drawing(top_p=0.7),
    "min_p": drawing(extra={"min_p": 0.2}),
    "typical_p": drawing(extra={"typical_p": 0.6}),
    "epsilon_cutoff": drawing(extra={"epsilon_cutoff": 0.02}),
    "eta_cutoff": drawing(extra={"eta_cutoff": 0.05}),
    "all": drawing(
        temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3,
        min_new_tokens=3, extra={"logit_bias": ((7, 2.0),), "min_p": 0.01, "no_repeat_ngram_size": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_answers_and_both_log_probabilities_follow_the_formulas(engine: Any, pair: tuple[Any, Any], name: str) -> None:
    sampling = Sampling(**{field: getattr(KEYS[name], field) for field in Sampling.__slots__} | {"logprobs": True})
    changed = 0
    for key, done in ask(engine, sampling).items():
        prompt, answer = PROMPTS[key], list[int]()
        numbers = uniforms(Request(key, prompt, sampling), 8)
        assert done.logprobs is not None and done.warped_logprobs is not None
        assert len(done.logprobs) == len(done.warped_logprobs) == len(done.ids)
        for at, token in enumerate(done.ids):
            own = logits_of(pair[0], [*prompt, *answer])
            scores = warped(own, prompt, answer, sampling)
            if sampling.do_sample:
                assert token == int(draw(scores[None], numbers[at : at + 1])[0])
            else:
                assert token == int(scores.argmax())
            assert done.logprobs[at] == pytest.approx(float(own.log_softmax(-1)[token]), abs=1e-4)
            assert done.warped_logprobs[at] == pytest.approx(float(scores.log_softmax(-1)[token]), abs=1e-4)
            changed += abs(done.logprobs[at] - done.warped_logprobs[at]) > 1e-3
            answer.append(token)
    assert bool(changed) == (name not in ("greedy", "sampled"))


@pytest.mark.parametrize("name", [name for name, sampling in KEYS.items() if sampling.do_sample])
def test_draws_are_distributed_as_the_formulas_say(engine: Any, pair: tuple[Any, Any], name: str) -> None:
    """Pearson's chi-squared over the tokens that are expected often enough, against its mean and deviation."""
    count, prompt = 1500, PROMPTS[0]
    sampling = Sampling(**{f: getattr(KEYS[name], f) for f in Sampling.__slots__} | {"max_new_tokens": 1})
    engine.batch_size = 500
    counts = Counter(done.ids[0] for done in ask(engine, sampling, [prompt] * count).values())
    want = count * warped(logits_of(pair[0], prompt), prompt, [], sampling).softmax(-1)
    assert all(want[token] > 0 for token in counts)
    often = [token for token in range(len(want)) if want[token] >= 5]
    rest = (count - sum(counts[t] for t in often), count - sum(float(want[t]) for t in often))
    cells = [(counts[t], float(want[t])) for t in often] + ([rest] if rest[1] >= 5 else [])
    distance = sum((got - expected) ** 2 / expected for got, expected in cells)
    free = len(cells) - 1
    assert len(cells) > 1 and distance < free + 4 * math.sqrt(2 * free)


def test_several_answers_have_streams_of_their_own_and_the_first_is_that_of_one(engine: Any) -> None:
    one, several = drawing(), drawing(n=4, logprobs=True)
    alone, together = ask(engine, one), ask(engine, several)
    for key, done in together.items():
        assert done.ids == alone[key].ids
        answers = [done, *done.others]
        assert [answer.number for answer in answers] == [0, 1, 2, 3]
        assert len({answer.ids for answer in answers}) > 1
        assert all(answer.logprobs and len(answer.logprobs) == len(answer.ids) for answer in answers)
    engine.batch_size = 3
    assert _ids(ask(engine, several)) == _ids(together)
    pieces: dict[int, str] = {}
    for number, piece in engine.stream_several(Request(2, PROMPTS[2], several)):
        pieces[number] = pieces.get(number, "") + piece
    want = [together[2], *together[2].others]
    assert [pieces.get(at, "") for at in range(4)] == [answer.text for answer in want]
    assert "".join(engine.stream(Request(2, PROMPTS[2], several))) == want[0].text


def _ids(answers: dict[int, Completion]) -> dict[int, list[tuple[int, ...]]]:
    return {key: [one.ids for one in (done, *done.others)] for key, done in answers.items()}


def test_several_beams_are_transformers_best(engine: Any, pair: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=5, num_beams=4, n=3)
    prompt = torch.tensor([PROMPTS[0]])
    config = GenerationConfig(
        max_new_tokens=5, num_beams=4, num_return_sequences=3, do_sample=False, eos_token_id=END, pad_token_id=0
    )
    pair[0].generation_config = GenerationConfig()
    rows = pair[0].generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    want = [row[: row.index(END) + 1] if END in row else row for row in rows[:, len(PROMPTS[0]) :].tolist()]
    assert [list(ids) for ids in _ids(ask(engine, sampling, PROMPTS[:1]))[0]] == want
    texts = dict(engine.stream_several(Request(0, PROMPTS[0], sampling)))
    assert len(texts) == 3 and texts[0] == ask(engine, sampling, PROMPTS[:1])[0].text


def test_a_row_that_fails_fails_for_all_its_answers(engine: Any) -> None:
    answers = ask(engine, drawing(n=3), [[], [5]])
    assert answers[0].finish_reason == "error" and not answers[0].others
    assert len(answers[1].others) == 2
    for extra in ({"logit_bias": ((9999, 1.0),)}, {"forced_bos_token_id": 9999}, {"bad_words_ids": ((5, 9999),)}):
        beyond = ask(engine, Sampling(extra=extra), [[5]])[0]
        assert "9999" in str(beyond.error)


def test_a_stop_string_is_found_across_token_borders(engine: Any) -> None:
    whole = ask(engine, Sampling(max_new_tokens=12, min_new_tokens=12))
    for size in (2, 3, 5):
        for key, done in whole.items():
            stop = done.text[4 : 4 + size]
            cut = ask(engine, Sampling(max_new_tokens=12, min_new_tokens=12, stop=("\x00", stop)))[key]
            assert cut.text == done.text[: done.text.index(stop)] and cut.finish_reason == "stop"


def test_rows_with_and_without_log_probabilities_share_a_batch(engine: Any) -> None:
    settings = [Sampling(max_new_tokens=3 + key, logprobs=key % 2 == 0) for key in range(6)]
    done = {c.key: c for c in engine.generate([Request(k, PROMPTS[k], s) for k, s in enumerate(settings)])}
    assert [done[key].logprobs is not None for key in range(6)] == [True, False] * 3
    assert all(one.logprobs is None or len(one.logprobs) == len(one.ids) for one in done.values())
