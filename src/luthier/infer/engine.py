"""The generation engine on Luthier's own decoder: the weights that are trained, a cache, continuous batches.

    requests → refused ones complete with an error → rows → Session rounds → Completions as rows finish

Settings that a single beam's steps cannot serve (beams, guidance) go through transformers' `generate` on the same
decoder, so no key is ever ignored.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from luthier.errors import Fault
from luthier.events import Sink, Warned, progress, silent
from luthier.infer.answer import Answers, is_out_of_memory
from luthier.infer.cache import Cache, Prefix
from luthier.infer.forward import Forward
from luthier.infer.generate import HfEngine
from luthier.infer.memory import free_bytes
from luthier.infer.rules import Rules, unknown
from luthier.infer.session import Row, Session
from luthier.infer.several import expanded, folded
from luthier.infer.wrapped import Wrapped
from luthier.model.decoder.adapter import Adapter
from luthier.model.decoder.decoder import Decoder
from luthier.model.tunable import Tokens
from luthier.plan.slots import Sizes, Slots, positions_of, waves
from luthier.types import Completion, Request

SHARED = 16  # tokens that prompts must have in common to be read once


@dataclass(frozen=True)
class Kept:
    """What the last streamed request left in the cache, and what it was read with."""

    prefix: Prefix
    adapter: str | None
    state: tuple[int, ...]


class DecoderEngine:
    """Implements `types.Engine` over a `Decoder`. A row's answer does not depend on the rows beside it."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokens,
        *,
        batch_size: int | None = None,
        use_base: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
        sink: Sink = silent,
        context: int | None = None,
        logprobs: bool = False,
        stage: str = "generate",
    ) -> None:
        """The decoder may be in training mode; it is asked with the weights that it has when a call begins.

        Args:
            decoder: the model, on its device.
            tokenizer: decodes answers and names the ids that end them.
            batch_size: most rows at once; None lets memory decide.
            use_base: leave the adapter out.
            adapters: those that requests may name, over a decoder without one of its own; a request that names none
                is answered by the base. Rows of all of them share a batch.
            sink: receives progress, in rows.
            context: positions of the model's context; None where it has no bound.
            logprobs: completions carry the log-probability of each token before any rule or warping.
            stage: the name under which progress is reported.
        """
        self.decoder, self.tokenizer, self.use_base = decoder, tokenizer, use_base
        self.adapters = dict(adapters or {})
        self.batch_size, self.sink, self.logprobs, self.stage = batch_size, sink, logprobs, stage
        ends = tuple(dict.fromkeys(int(token) for token in tokenizer.eos_ids))
        self.answers = Answers(tokenizer, ends, context, decoder.shape.vocab)
        self._kept: Kept | None = None

    def refusal(self, request: Request) -> Fault | None:
        """Why this request cannot be answered, or None."""
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            message = f"there is no adapter {request.adapter!r} here; there are: {known}"
            return Fault("config-conflict", message, received=request.adapter, allowed=known)
        return self.answers.refusal(request)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as rows finish, in any order; match them by key. A row that cannot be run yields an error.

        Several answers to a prompt come as one completion.
        """
        waiting = list(requests)
        yield from progress(self.sink, self.stage, self._complete(waiting), total=len(waiting), unit="rows")

    def stream(self, request: Request) -> Iterator[str]:
        """The answer to one request in whole characters, as it grows; closing the iterator stops the model.

        What was read for it stays in memory, one slot of the cache: where the next request to be streamed begins alike,
        as the next turn of a conversation does, that beginning is not read again.

        Beam search knows its answer only at the end, so it arrives in one piece. Of several answers this is the first.

        Raises:
            ValueError: the request cannot be run; the message says why.
        """
        fault = self.refusal(request)
        if fault:
            raise ValueError(fault.message)
        if unknown(request.sampling):
            yield from self.by_transformers(request.adapter).stream(request)
            return
        with closing(self._stream([request])) as pieces:  # else it would not end with this one on every Python
            for _, piece in pieces:
                yield piece

    def stream_several(self, request: Request) -> Iterator[tuple[int, str]]:
        """All answers to one request as they grow side by side: pieces of text, each with its answer's number.

        Raises:
            ValueError: as `stream`.
        """
        fault = self.refusal(request)
        if fault:
            raise ValueError(fault.message)
        if unknown(request.sampling):
            yield from self.by_transformers(request.adapter).stream_several(request)
            return
        yield from self._stream(expanded([request]))

    def _stream(self, requests: Sequence[Request]) -> Generator[tuple[int, str], None, None]:
        rows = self._rows(requests)
        texts = [self.answers.growing(row.request) for row in rows]
        forward = self._forward(rows)
        ((_, slots),) = self._waves(rows)  # they are alike
        session = self._session(forward, rows, slots)
        try:
            while session.open:
                before = [row.made for row in rows]
                session.round()
                for row, text, seen in zip(rows, texts, before, strict=True):
                    for piece in text.take(row.answer[seen:], last=row.done):
                        yield row.request.number, piece
        except GeneratorExit:  # the reader has had enough, and what it was given may be part of the next prompt
            self._keep(session, rows)
            raise
        self._keep(session, rows)

    # ------------------------------------------------------------------------------------------------ many rows

    def _complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        own: list[Request] = []
        others: list[Request] = []
        for request in requests:
            fault = self.refusal(request)
            if fault:
                yield Completion(request.key, (), "", "error", error=fault.message)
            else:
                (others if unknown(request.sampling) else own).append(request)
        if own:
            yield from folded(own, self._run(self._rows(expanded(own))))
        for name in dict.fromkeys(request.adapter for request in others):
            same = [request for request in others if request.adapter == name]
            yield from self.by_transformers(name).generate(same)

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        """Longest first, so that memory is asked for at its largest at once and the last rows to finish are short."""
        device = str(self.decoder.device)
        rows = []
        for request in requests:
            steps = self.answers.steps(request)
            rules = Rules(request, self.answers, device)
            rows.append(Row(request, steps, rules, list(request.prompt_ids)))
        return sorted(rows, key=lambda row: (-len(row.ids) - row.steps, row.request.key, row.request.number))

    def _run(self, rows: list[Row]) -> Iterator[Completion]:
        """Answer rows, in waves of similar length where memory is short."""
        forward = self._forward(rows)
        for count, slots in self._waves(rows):
            wave, rows = rows[:count], rows[count:]
            yield from self._wave(forward, wave, slots)

    def _wave(self, forward: Forward, rows: list[Row], slots: Slots) -> Iterator[Completion]:
        """Answer rows; when memory runs out, go on with half as many at once, and give up on a row that is alone."""
        session: Session | None = None
        while rows:
            try:
                session = self._session(forward, rows, slots)
                while session.open:
                    for row in session.round():
                        rows.remove(row)
                        told = (row.logprobs, row.warped) if session.told_of(row) else (None, None)
                        yield self.answers.completion(row.request, row.answer, *told)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if slots.rows == 1:
                    asked = rows.pop(0).request
                    yield Completion(
                        asked.key, (), "", "error", error="out of memory for this row; shorten it", number=asked.number
                    )
                slots = replace(slots, rows=max(1, min(slots.rows, len(rows)) // 2))
                rows = self._rows([row.request for row in rows])  # from the start: their draws are keyed
            session = None  # its cache is let go of before another is made
            if rows and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _forward(self, rows: Sequence[Row]) -> Forward:
        alone = len(rows) == 1 or self.batch_size == 1  # one row is read as fast as it can be in any layout
        named = dict.fromkeys(row.request.adapter for row in rows if row.request.adapter is not None)
        return Forward(
            self.decoder,
            use_base=self.use_base,
            steps=0 if alone else max(row.steps for row in rows),
            adapters=[self.adapters[name] for name in named],
            sink=self.sink,
        )

    def _session(self, forward: Forward, rows: Sequence[Row], slots: Slots) -> Session:
        with torch.inference_mode():
            cache = Cache(self.decoder.shape, slots.rows, slots.capacity, self.decoder.device, self.decoder.dtype)
            prompts: dict[int, list[tuple[int, ...]]] = {}  # adapters read the same beginning differently
            for row in rows:
                prompts.setdefault(forward.number_of(row.request.adapter), []).append(tuple(row.request.prompt_ids))
            shared = {number: _shared(own) for number, own in prompts.items()}
            prefixes = {number: forward.read_prefix(ids, number, slots.read) for number, ids in shared.items() if ids}
            if len(rows) == 1 and (known := self._known(rows[0].request)).ids:
                prefixes = {forward.number_of(rows[0].request.adapter): known}
        return Session(
            forward, self.answers, cache, rows,
            prefixes=prefixes, read=slots.read, logprobs=self.logprobs,
            told=lambda message: self.sink(Warned(text=message)),
        )  # fmt: skip

    def _keep(self, session: Session, rows: Sequence[Row]) -> None:
        if len(rows) == 1:
            self._kept = Kept(session.left(rows[0]), rows[0].request.adapter, self._state())

    def _known(self, request: Request) -> Prefix:
        """What of the prompt the last streamed request left: as long as nothing that it was read with has changed."""
        kept, self._kept = self._kept, None
        if kept is None or (kept.adapter, kept.state) != (request.adapter, self._state()):
            return Prefix()
        count = _alike(kept.prefix.ids, request.prompt_ids[:-1])
        return kept.prefix.first(count) if count >= SHARED else Prefix()

    def _state(self) -> tuple[int, ...]:
        """Another one when weights have changed."""
        return tuple(parameter._version for parameter in self.decoder.parameters())

    def _waves(self, rows: Sequence[Row]) -> list[tuple[int, Slots]]:
        """How many of the rows are answered together, and in which slots; as `luthier plan` tells it."""
        needs = [len(row.request.prompt_ids) + row.steps for row in rows]
        device = self.decoder.device
        return waves(sizes_of(self.decoder), device.type, free_bytes(device), needs, self.batch_size)

    def by_transformers(self, adapter: str | None = None, *, sink: Sink = silent) -> HfEngine:
        """Transformers' `generate` over the same decoder."""
        device = self.decoder.device
        context: Any = self.decoder.without_adapter if self.use_base else nullcontext
        if adapter is not None:
            context = partial(self.decoder.using, self.adapters[adapter].layers)
        self.decoder.refresh()
        return HfEngine(
            Wrapped(self.decoder, self.answers.limit), self.tokenizer,
            batch_size=self.batch_size, context=context, stage=self.stage, sink=sink,
            positions=positions_of(sizes_of(self.decoder), device.type, free_bytes(device)),
        )  # fmt: skip


def sizes_of(decoder: Decoder) -> Sizes:
    """What a row of this decoder takes depends on these."""
    shape = decoder.shape
    return Sizes(
        shape.layers, shape.hidden, shape.intermediate, shape.q_rows, shape.kv_rows, shape.vocab, decoder.dtype.itemsize
    )


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, short of any whole prompt; nothing where it is not worth reading apart."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)  # in the order of their ids: what these two share, all share
    count = _alike(first, last[: min(len(prompt) for prompt in prompts) - 1])
    return tuple(first[:count]) if count >= SHARED else ()


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    most = min(len(first), len(second))
    return next((at for at in range(most) if first[at] != second[at]), most)
