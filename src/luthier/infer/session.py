"""Continuous batching: rows wait, are read into a slot, answered token by token, and leave the slot to the next.

    round = admit (read waiting prompts) or step (a token for every row), in turns → what is finished leaves

Rows lie in the first slots without gaps, so that a step is a prefix of the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from luthier.infer.answer import Answers
from luthier.infer.cache import Cache, Prefix
from luthier.infer.drawing import logprob_of
from luthier.infer.forward import Forward
from luthier.infer.rules import Rules, choose
from luthier.infer.stepping import Stepper
from luthier.kernels.host import likeliest
from luthier.types import Request

TOGETHER = 16  # a sixteenth of the slots is read together: a prompt by itself costs nearly as much as several
SEEN = 4  # tokens held before that take as much memory of a round, as keys and values in a row, as one that is read
BURST = 4  # steps between two looks at what they made, on a device that works while the host does not


@dataclass
class Row:
    """A request on its way. ``ids``: prompt and answer; of the prompt, ``held`` tokens are in its slot, then all.

    Of the answer, the last one is not yet in the cache.
    """

    request: Request
    steps: int
    rules: Rules
    ids: list[int]
    held: int = 0
    logprobs: list[float] = field(default_factory=list)
    warped: list[float] = field(default_factory=list)
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
        prefixes: Mapping[int, Prefix],
        read: int,
        logprobs: bool = False,
        told: Callable[[str], None] = lambda message: None,
    ) -> None:
        """``prefixes``: what all rows of an adapter begin with, by its number, where it was read before.

        ``read``: prompt tokens that are read in one round, at most: a pass takes no more memory than was planned, and
        answers on their way are not kept waiting. ``told`` hears what should be known of how it runs.
        """
        self.forward, self.answers, self.cache = forward, answers, cache
        self.waiting, self.running = deque(rows), list[Row]()
        self.prefixes, self.read, self.logprobs = prefixes, read, logprobs
        self.stepper = Stepper(forward, cache, answers.ends, told)
        self._changed, self._just_read = True, False

    @property
    def open(self) -> bool:
        """Whether there is a row left."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def round(self) -> list[Row]:
        """Read waiting prompts, or give every running row a token; the rows that this finishes, in no order."""
        if self._may_read() and not (self._just_read and self.running):
            self._admit()
            self._just_read = True
        else:
            self._step()
            self._just_read = False
        finished = [row for row in self.running if row.done]
        if finished:
            self._close_gaps()
        return finished

    def left(self, row: Row) -> Prefix:
        """What the cache holds of a row that was alone, finished or not: all but the last token of its answer."""
        return self.cache.prefix(0, row.ids[: row.held + max(0, row.made - 1)])

    # --------------------------------------------------------------------------------------------------- reading

    def _may_read(self) -> bool:
        """Whether enough waits, and enough slots are free, to read now."""
        free = self.cache.slots - len(self.running)
        wanted = min(len(self.waiting), max(1, self.cache.slots // TOGETHER))
        return bool(self.waiting) and (not self.running or free >= wanted)

    def _admit(self) -> None:
        """Read as many waiting prompts as there are slots and one round allows; each gets its first token.

        Of a prompt that is longer than a round allows, a piece, into the slot behind the running rows.
        """
        first, chosen, tokens = len(self.running), list[Row](), 0
        while self.waiting and first + len(chosen) < self.cache.slots:
            unread = self._unread(self.waiting[0])
            tokens += unread + (len(self.waiting[0].ids) - unread) // SEEN
            if tokens > self.read and (chosen or unread > self.read):
                break
            chosen.append(self.waiting.popleft())
        self._changed = True
        if not chosen:
            row = self.waiting[0]
            self._fill([row], first, len(row.ids) - self._unread(row) + self.read)
            return
        self.running += chosen
        scores_rv = self._fill(chosen, first)
        floor = torch.tensor([row.rules.floor for row in chosen], device=scores_rv.device)
        blocked = any(row.rules.floor for row in chosen) and len(self.answers.ends) > 0
        own_rv = self.stepper.block(scores_rv, floor) if blocked else scores_rv
        self._take(chosen, scores_rv, own_rv, likeliest(own_rv))

    @property
    def _begun(self) -> int:
        """How many tokens the slot behind the running rows holds of a prompt that is read in pieces."""
        return self.waiting[0].held if self.waiting else 0

    def _unread(self, row: Row) -> int:
        """How many tokens of a waiting row's prompt are to be read yet."""
        prefix = self.prefixes.get(self.forward.number_of(row.request.adapter), Prefix())
        return len(row.ids) - max(row.held, len(prefix.ids))

    def _fill(self, rows: Sequence[Row], first: int, stop: int | None = None) -> torch.Tensor:
        """Read the prompts of rows, up to ``stop``, into the slots from ``first`` on; scores of what follows each."""
        numbers = self._adapters(rows)
        for number, prefix in self.prefixes.items():
            fresh = {first + at: row for at, row in enumerate(rows) if numbers[at] == number and not row.held}
            if fresh:
                self.cache.spread(list(fresh), prefix)
            for row in fresh.values():
                row.held = len(prefix.ids)
        ids = [row.ids[:stop] for row in rows]
        slots = range(first, first + len(rows))
        scores_rv = self.forward.prefill(ids, slots, self.cache, [row.held for row in rows], numbers)
        for row, own in zip(rows, ids, strict=True):
            row.held = len(own)
        return scores_rv

    # -------------------------------------------------------------------------------------------------- answering

    def _step(self) -> None:
        """A token for every row; several where nothing but their end has to be looked at."""
        rows = self.running
        if self._changed:
            blocked = [row.rules.floor - row.made for row in rows]
            lengths = [len(row.ids) - 1 for row in rows]
            adapters, idle = self._adapters(rows), self.cache.capacity - 1 if self._begun else 0
            self.stepper.put([row.ids[-1] for row in rows], lengths, blocked, adapters, idle)
            self._changed = False
        count = self._burst()
        longest = max(self._begun, *(len(row.ids) for row in rows))
        floor = bool(self.answers.ends) and any(row.made < row.rules.floor for row in rows)
        made = []
        for number in range(count):
            step = self.stepper.advance(len(rows), longest + number, floor)
            made.append(step.likeliest.clone() if count > 1 else step.likeliest)
        if count == 1:
            chosen_r = self._take(rows, step.raw, step.scores, step.likeliest)
            if chosen_r is not step.likeliest:
                self.stepper.ids[: len(rows)] = chosen_r
            return
        for tokens in torch.stack(made).tolist():
            for row, token in zip(rows, tokens, strict=True):
                if not row.done:
                    self._append(row, token)

    def _adapters(self, rows: Sequence[Row]) -> list[int]:
        return [self.forward.number_of(row.request.adapter) for row in rows]

    def _burst(self) -> int:
        """How many steps may be taken before their tokens are looked at."""
        if not self.stepper.graphs or any(map(self.told_of, self.running)):
            return 1
        if not all(row.rules.plain and not row.request.sampling.stop for row in self.running):
            return 1
        return min(BURST, *(row.steps - row.made for row in self.running))

    def _take(
        self, rows: Sequence[Row], raw_rv: torch.Tensor, scores_rv: torch.Tensor, likeliest_r: torch.Tensor
    ) -> torch.Tensor:
        """Choose the next token of each row and settle which rows that finishes; the tokens, on the device."""
        chosen_r = likeliest_r
        told = any(map(self.told_of, rows))
        if not all(row.rules.plain for row in rows):
            ids = [row.ids for row in rows]
            chosen_r, scores_rv = choose(scores_rv, [row.rules for row in rows], ids, told=told)
        if told:
            own, warped = (logprob_of(values_rv, chosen_r).tolist() for values_rv in (raw_rv, scores_rv))
            for at, row in enumerate(rows):
                row.logprobs.append(own[at])
                row.warped.append(warped[at])
        for row, token in zip(rows, chosen_r.tolist(), strict=True):
            self._append(row, token)
        return chosen_r

    def told_of(self, row: Row) -> bool:
        """Whether the log-probabilities of its tokens are wanted."""
        return self.logprobs or row.request.sampling.logprobs

    def _append(self, row: Row, token: int) -> None:
        row.ids.append(token)
        row.done = self._finished(row, token)

    def _finished(self, row: Row, token: int) -> bool:
        if token in self.answers.ends or row.made >= row.steps:
            return True
        stops = row.request.sampling.stop
        return bool(stops) and self.answers.has_stop(row.answer, stops)

    def _close_gaps(self) -> None:
        """Move the last rows into the slots that finished rows leave, and what is read in pieces behind them."""
        self._changed = True
        at, behind = 0, len(self.running)
        while at < len(self.running):
            if not self.running[at].done:
                at += 1
                continue
            last = self.running.pop()
            if at < len(self.running) and not last.done:
                self.cache.move(len(self.running), at, len(last.ids) - 1)
            if at < len(self.running):
                self.running[at] = last
        if self._begun and len(self.running) < behind:
            self.cache.move(behind, len(self.running), self._begun)
