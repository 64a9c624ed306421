"""Continuous batching: rows wait, are read into a slot, answered token by token, and leave the slot to the next.

    round = admit (read waiting prompts) → step (one token for every row) → what is finished leaves

Rows lie in the first slots without gaps, so that a step is a prefix of the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from luthier.infer.answer import Answers
from luthier.infer.cache import Cache
from luthier.infer.forward import Forward, Prefix
from luthier.infer.rules import Rules, choose
from luthier.types import Request


@dataclass
class Row:
    """A request on its way. ``ids``: prompt and answer; the last one is not yet in the cache."""

    request: Request
    steps: int
    rules: Rules
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def answer(self) -> list[int]:
        """What has been generated."""
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def made(self) -> int:
        """How many tokens have been generated."""
        return len(self.ids) - len(self.request.prompt_ids)


class Session:
    """Answers rows over one cache. Every round is self-contained: nothing of torch's state is held between rounds."""

    def __init__(
        self,
        forward: Forward,
        answers: Answers,
        cache: Cache,
        rows: Iterable[Row],
        *,
        prefix: Prefix,
        read: int,
        logprobs: bool = False,
    ) -> None:
        """``read``: prompt tokens that are read in one round, so that answers on their way are not kept waiting."""
        self.forward, self.answers, self.cache = forward, answers, cache
        self.waiting, self.running = deque(rows), list[Row]()
        self.prefix, self.read, self.logprobs = prefix, read, logprobs
        self._ends = torch.tensor(answers.ends, dtype=torch.long, device=forward.device)
        self._ids_r = self._lengths_r = torch.zeros(0, dtype=torch.long, device=forward.device)
        self._changed = True

    @property
    def open(self) -> bool:
        """Whether there is a row left."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def round(self) -> list[Row]:
        """Give every running row a token; the rows that are finished by it, in no particular order."""
        admitted = self._admit()
        if not admitted:
            self._step()
        finished = [row for row in self.running if row.done]
        if finished:
            self._close_gaps()
        return finished

    # --------------------------------------------------------------------------------------------------- reading

    def _admit(self) -> bool:
        """Read as many waiting prompts as there are slots and one round allows; each gets its first token."""
        chosen: list[Row] = []
        tokens = 0
        while self.waiting and len(self.running) + len(chosen) < self.cache.slots:
            tokens += len(self.waiting[0].ids) - len(self.prefix.ids)
            if chosen and tokens > self.read:
                break
            chosen.append(self.waiting.popleft())
        if not chosen:
            return False
        first = len(self.running)
        slots = range(first, first + len(chosen))
        self.running += chosen
        self._changed = True
        scores_rv = self.forward.prefill([row.ids for row in chosen], slots, self.cache, self.prefix)
        self._take(chosen, scores_rv)
        return True

    # -------------------------------------------------------------------------------------------------- answering

    def _step(self) -> None:
        rows = self.running
        if self._changed:
            device = self.forward.device
            self._ids_r = torch.tensor([row.ids[-1] for row in rows], device=device)
            self._lengths_r = torch.tensor([len(row.ids) - 1 for row in rows], device=device)
            self._changed = False
        longest = max(len(row.ids) for row in rows)
        scores_rv = self.forward.step(self._ids_r, self._lengths_r, self.cache, longest)
        self._ids_r = self._take(rows, scores_rv)
        self._lengths_r = self._lengths_r + 1

    def _take(self, rows: Sequence[Row], scores_rv: torch.Tensor) -> torch.Tensor:
        """Choose the next token of each row and settle which rows that finishes; the tokens, on the device."""
        raw_rv = scores_rv
        blocked = [at for at, row in enumerate(rows) if row.made < row.rules.floor]
        if blocked and len(self._ends):
            if self.logprobs:
                scores_rv = scores_rv.clone()
            index = torch.tensor(blocked, device=scores_rv.device)
            scores_rv[index[:, None], self._ends] = float("-inf")
        if all(row.rules.plain for row in rows):
            chosen_r = scores_rv.argmax(-1)
        else:
            chosen_r = choose(scores_rv, [row.rules for row in rows], [row.ids for row in rows])
        logprobs = self._logprobs(raw_rv, chosen_r) if self.logprobs else None
        for at, (row, token) in enumerate(zip(rows, chosen_r.tolist(), strict=True)):
            row.ids.append(token)
            if logprobs is not None:
                row.logprobs.append(logprobs[at])
            row.done = self._finished(row, token)
        return chosen_r

    def _finished(self, row: Row, token: int) -> bool:
        if token in self.answers.ends or row.made >= row.steps:
            return True
        stops = row.request.sampling.stop
        return bool(stops) and self.answers.has_stop(row.answer, stops)

    def _logprobs(self, scores_rv: torch.Tensor, chosen_r: torch.Tensor) -> list[float]:
        taken_r = scores_rv.gather(1, chosen_r[:, None])[:, 0] - scores_rv.logsumexp(-1)
        values: list[float] = taken_r.tolist()
        return values

    def _close_gaps(self) -> None:
        """Move the last rows into the slots that finished rows leave."""
        self._changed = True
        at = 0
        while at < len(self.running):
            if not self.running[at].done:
                at += 1
                continue
            last = self.running.pop()
            if at < len(self.running) and not last.done:
                self.cache.move(len(self.running), at, len(last.ids) - 1)
            if at < len(self.running):
                self.running[at] = last
