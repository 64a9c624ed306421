"""What listens in on transformers' `generate`: for ids, stop strings, a reader who has gone, log-probabilities."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from luthier.infer.answer import Answers
from luthier.infer.drawing import logprob_of


class Record:
    """The log-probabilities of the tokens of a batch: in the model's own scores, and in those they were chosen from.

    Used as a processor (`warped`, the last before the draw), as a criterion (`taken`) and around the whole call.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._values = model, list[tuple[torch.Tensor, torch.Tensor]]()
        self._own_rv = self._warped_rv = torch.empty(0)

    def __enter__(self) -> None:
        self._hook = self._model.register_forward_hook(self._seen)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _seen(self, module: Any, given: Any, made: Any) -> None:
        self._own_rv = made.logits[:, -1].float()

    def warped(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that changes nothing."""
        self._warped_rv = scores
        return scores

    def taken(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion that stops nothing."""
        chosen_r = input_ids[:, -1]
        self._values.append((logprob_of(self._own_rv, chosen_r), logprob_of(self._warped_rv, chosen_r)))
        return torch.zeros(len(chosen_r), dtype=torch.bool, device=chosen_r.device)

    def of(self, row: int) -> tuple[list[float], list[float]]:
        """Both, a token each, of one row; a row that ended early has more than it has tokens."""
        own, warped = ([float(pair[which][row]) for pair in self._values] for which in (0, 1))
        return own, warped


class TokenQueue(BaseStreamer):  # type: ignore[misc]
    """Hands ids from the generating thread to the reading one."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt = prompt_length
        self._items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, which is dropped, then with each new id."""
        for token in value.flatten().tolist():
            if self._prompt:
                self._prompt -= 1
            else:
                self._items.put(token)

    def end(self) -> None:
        """The answer is complete."""
        self._items.put(None)

    def fail(self, error: BaseException) -> None:
        """Generation failed; the reader raises this."""
        self._items.put(error)

    def __iter__(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class StopText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row as soon as its answer holds a stop string."""

    def __init__(self, answers: Answers, stops: Sequence[str], width: int) -> None:
        self._answers, self._stops, self._width = answers, stops, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[rows] which of them are done."""
        done = [self._answers.has_stop(row, self._stops) for row in input_ids[:, self._width :].tolist()]
        return torch.tensor(done, device=input_ids.device)


class Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends every row once the reader has gone."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[rows] which of them are done: all, or none."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)
