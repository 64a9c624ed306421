"""How the next token is drawn when an answer is sampled: warping, then one uniform number per row and position.

Each request has its own stream of uniform numbers, made from (seed, key) alone, so an answer does not depend on which
other rows shared its batch. The filters are transformers' own; the draw walks the vocabulary in order until the
cumulative probability passes the uniform number (inverse transform sampling).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from luthier.infer.constrain import Path
from luthier.types import Request, Sampling

# Keys of `Sampling.extra` that reshape the distribution before the draw, in the order they are applied.
WARPERS: Mapping[str, Callable[[Any, str], LogitsProcessor]] = {
    "min_p": lambda value, device: MinPLogitsWarper(min_p=value),
    "typical_p": lambda value, device: TypicalLogitsWarper(mass=value),
    "epsilon_cutoff": lambda value, device: EpsilonLogitsWarper(epsilon=value),
    "eta_cutoff": lambda value, device: EtaLogitsWarper(epsilon=value, device=device),
}
NEUTRAL: Mapping[str, float] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0}


def request_seed(seed: int | None, key: int, number: int = 0) -> int:
    """The seed of the stream of one answer to a request; without a declared seed, a fresh one from the system."""
    if seed is None:
        return secrets.randbits(63)
    name = f"{seed}:{key}:{number}" if number else f"{seed}:{key}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def warpers(sampling: Sampling, device: str) -> LogitsProcessorList:
    """The library's filters for these settings: temperature, top-k, top-p, then those of `extra`."""
    chosen = LogitsProcessorList()
    if sampling.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    for name, make in WARPERS.items():
        value = sampling.extra.get(name)
        if value is not None and value != NEUTRAL[name]:
            chosen.append(make(value, device))
    return chosen


class Counted(LogitsProcessor):
    """Takes the frequency penalty as often as the answer holds a token, and the presence penalty once if it does.

    score - frequency * count - presence * (count > 0), with counts over the answer alone, as OpenAI's API defines them:
    https://platform.openai.com/docs/api-reference/chat/create
    """

    def __init__(self, presence: float, frequency: float, prompt_width: int) -> None:
        self._presence, self._frequency, self._prompt_width = presence, frequency, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [rows, vocabulary] → those of tokens in the answer lowered (or raised, by a penalty under 0)."""
        answer_rt = input_ids[:, self._prompt_width :].to(scores.device)
        counts_rv = torch.zeros_like(scores).scatter_add_(1, answer_rt, torch.ones_like(answer_rt, dtype=scores.dtype))
        return scores - self._frequency * counts_rv - self._presence * (counts_rv > 0)


class First(LogitsProcessor):
    """Makes every answer begin with one token (the library's own processor only knows encoder-decoder models)."""

    def __init__(self, token: int, prompt_width: int) -> None:
        self._token = token
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [rows, vocabulary] → at the first position, 0 at the token and -inf elsewhere."""
        if input_ids.shape[1] != self._prompt_width:
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._token] = 0.0
        return forced


class Constrained(LogitsProcessor):
    """Leaves what the paths of the rows allow, and never nothing."""

    def __init__(self, paths: Sequence[Path], prompt_width: int) -> None:
        self._paths, self._prompt_width = paths, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [rows, vocabulary] → -inf at the tokens that may not follow."""
        on_host = scores.float().cpu()
        may_rv = torch.zeros(scores.shape, dtype=torch.bool)
        for at, path in enumerate(self._paths):
            path.take(input_ids[at, self._prompt_width + path.made :].tolist())
            may_rv[at] = torch.from_numpy(path.allowed(on_host[at].numpy()))
        left_rv = scores.masked_fill(~may_rv.to(scores.device), float("-inf"))
        stuck_r1 = left_rv.max(-1, keepdim=True).values == float("-inf")  # all that is allowed was suppressed
        return torch.where(stuck_r1, torch.where(may_rv.to(scores.device), 0.0, left_rv), left_rv)


def uniforms(request: Request, steps: int) -> torch.Tensor:
    """[steps] fp64 on the host: the numbers that decide this request's tokens, one a position."""
    stream = torch.Generator().manual_seed(request_seed(request.sampling.seed, request.key, request.number))
    return torch.rand(steps, generator=stream, dtype=torch.float64)


def draw(scores_rv: torch.Tensor, uniform_r: torch.Tensor) -> torch.Tensor:
    """[r] the token of each row that its number falls on; ``scores_rv`` after warping."""
    mass_rv = scores_rv.float().softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the total, which rounding may leave a little under 1: the draw then always lands on a kept token.
    target_r1 = uniform_r[:, None].to(mass_rv) * mass_rv[:, -1:]
    drawn_r1 = torch.searchsorted(mass_rv, target_r1, right=True).clamp_(max=scores_rv.shape[-1] - 1)
    dropped_r1 = scores_rv.gather(1, drawn_r1) == float("-inf")
    return torch.where(dropped_r1, scores_rv.argmax(dim=-1, keepdim=True), drawn_r1)[:, 0]


def logprob_of(scores_rv: torch.Tensor, chosen_r: torch.Tensor) -> torch.Tensor:
    """[r] the log-probability of each row's token under its scores."""
    return scores_rv.gather(1, chosen_r[:, None])[:, 0] - scores_rv.logsumexp(-1)


class Draw(LogitsProcessor):
    """Keeps exactly one token per row: the one drawn. Greedy choice after it therefore returns the draw."""

    def __init__(self, requests: Sequence[Request], prompt_width: int, steps: int) -> None:
        self._prompt_width = prompt_width
        self._uniform_rs = torch.stack([uniforms(request, steps) for request in requests])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [rows, vocabulary] after warping → 0 at the drawn token and -inf elsewhere."""
        drawn_r = draw(scores, self._uniform_rs[:, input_ids.shape[1] - self._prompt_width].to(scores.device))
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_r[:, None], 0.0)
