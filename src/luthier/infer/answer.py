"""From a request to what may be generated for it, and from generated ids to a `Completion`: what all engines share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from luthier.errors import Fault
from luthier.infer.constrain import Grammars, Path
from luthier.infer.text import IncrementalText, cut_at_stop, whole_characters
from luthier.infer.words import beyond
from luthier.model.tunable import Tokens
from luthier.types import Completion, Request


@dataclass(frozen=True)
class Answers:
    """The bounds of a model, and how its ids become answers.

    ends: every id that ends an answer. limit: positions of the model's context, None where it has none.
    """

    tokenizer: Tokens
    ends: tuple[int, ...]
    limit: int | None
    vocabulary: int

    @property
    def pad(self) -> int:
        """An id for places that are masked."""
        pad = self.tokenizer.pad_id
        return pad if pad is not None else (self.ends[0] if self.ends else 0)

    def refusal(self, request: Request) -> Fault | None:
        """Why this row cannot be answered, or None."""
        length = len(request.prompt_ids)
        if not length:
            return Fault(
                "data-prompt", "the prompt is empty: it has no token to continue from", received="no token",
                allowed="a text", fix="give a text of at least one token",
            )  # fmt: skip
        if self.limit is not None and length >= self.limit:
            return Fault(
                "data-prompt",
                f"the prompt has {length} tokens and the model's context {self.limit}: no room for an answer",
                received=f"{length} tokens", allowed=f"at most {self.limit - 1}", fix="shorten it",
            )  # fmt: skip
        if max(request.prompt_ids) >= self.vocabulary or min(request.prompt_ids) < 0:
            message = f"the prompt holds an id outside the model's vocabulary of {self.vocabulary}"
            wrong = next(token for token in request.prompt_ids if not 0 <= token < self.vocabulary)
            return Fault("data-prompt", message, received=wrong, allowed=f"0 to {self.vocabulary - 1}",
                         fix="encode the text with the tokenizer of this base")  # fmt: skip
        limit = request.sampling.extra.get("max_length")
        if limit is not None and length >= int(limit):
            return Fault(
                "config-conflict",
                f"the prompt has {length} tokens and generation.max_length is {limit}: no room for an answer",
                "generation.max_length", limit, f"over {length}", "set max_new_tokens instead",
            )  # fmt: skip
        return next(iter(beyond(request.sampling.extra, self.vocabulary)), None)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocabulary, self.ends)

    def path(self, request: Request) -> Path | None:
        """The way through what the request's settings allow; None where they constrain nothing."""
        return self._grammars.follow(request.sampling.extra, self.steps(request))

    def steps(self, request: Request) -> int:
        """New tokens for a row: as asked, and no further than `max_length` and the model's context reach."""
        length = len(request.prompt_ids)
        limits = [request.sampling.max_new_tokens]
        if self.limit is not None:
            limits.append(self.limit - length)
        if request.sampling.extra.get("max_length") is not None:
            limits.append(int(request.sampling.extra["max_length"]) - length)
        return min(limits)

    def trim(self, row: Sequence[int]) -> list[int]:
        """A row's ids through its first end-of-sequence id; what follows is padding."""
        end = next((at for at, token in enumerate(row) if token in self.ends), None)
        return list(row) if end is None else list(row[: end + 1])

    def completion(
        self,
        request: Request,
        ids: list[int],
        logprobs: Sequence[float] | None = None,
        warped: Sequence[float] | None = None,
    ) -> Completion:
        """The answer as text. ``ids`` keeps the end-of-sequence id where the model wrote one; the text does not."""
        ended = bool(ids) and ids[-1] in self.ends
        stops = request.sampling.stop
        stopped = False
        if stops:
            ids, stopped = self._ids_to_stop(ids, stops)
            ended = ended and not stopped
        text, _ = cut_at_stop(whole_characters(self.tokenizer.decode(ids[:-1] if ended else ids)), stops)
        kept, changed = (None if values is None else tuple(values[: len(ids)]) for values in (logprobs, warped))
        return Completion(
            request.key, tuple(ids), text, "stop" if ended or stopped else "length", kept,
            warped_logprobs=changed, number=request.number,
        )  # fmt: skip

    def growing(self, request: Request) -> Growing:
        """The text of an answer whose ids are still to come."""
        return Growing(IncrementalText(self.tokenizer.decode, request.sampling.stop), self.ends)

    def pieces(self, request: Request, tokens: Iterator[int]) -> Iterator[str]:
        """The text of ids as they come, in whole characters; ends at an end-of-sequence id or a stop string."""
        text = self.growing(request)
        for token in tokens:
            yield from text.take([token])
            if text.complete:
                return
        yield from text.take([], last=True)

    def has_stop(self, ids: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the last of ``ids`` completed a stop string. Looks at the end alone, whatever the length."""
        # A character takes at most four tokens, one a byte; a little more for the join with what precedes.
        window = 4 * max(map(len, stops)) + 8
        return cut_at_stop(self.tokenizer.decode(ids[-window:]), stops)[1]

    def _ids_to_stop(self, ids: list[int], stops: Sequence[str]) -> tuple[list[int], bool]:
        """The ids through the token that completed a stop string (a batch runs on until its last row is done)."""
        if not cut_at_stop(self.tokenizer.decode(ids), stops)[1]:
            return ids, False
        low, high = 1, len(ids)  # the shortest prefix whose text holds a stop string, by bisection
        while low < high:
            middle = (low + high) // 2
            if cut_at_stop(self.tokenizer.decode(ids[:middle]), stops)[1]:
                high = middle
            else:
                low = middle + 1
        return ids[:low], True


class Growing:
    """An answer in pieces of whole characters, up to an end-of-sequence id or a stop string."""

    def __init__(self, text: IncrementalText, ends: tuple[int, ...]) -> None:
        self._text, self._ends, self.complete = text, ends, False

    def take(self, ids: Sequence[int], *, last: bool = False) -> Iterator[str]:
        """The pieces that further ids bring; after the ``last`` ones, also what was held back."""
        for token in ids:
            if self.complete:
                return
            ended = token in self._ends
            piece = self._text.finish() if ended else self._text.push(token)
            self.complete = ended or self._text.stopped
            if piece:
                yield piece
        if last and not self.complete:
            self.complete = True
            rest = self._text.finish()
            if rest:
                yield rest


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the host had no room. Where a graph was being captured, the error before the last says so."""
    import torch

    while error is not None:
        text = str(error).lower()
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if known or "out of memory" in text or "can't allocate memory" in text:
            return True
        error = error.__context__
    return False
