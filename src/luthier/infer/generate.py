"""The generation engine over any transformers or PEFT causal language model: batched, keyed, seeded, streaming.

    requests → refused ones complete with an error → grouped by settings, sorted by length → batches → generate

Shapes in names: ``r`` rows of a batch, ``t`` positions, ``v`` vocabulary.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from luthier.events import Sink, progress, silent
from luthier.infer.drawing import WARPERS, Draw, First, request_seed, warpers
from luthier.infer.text import IncrementalText, cut_at_stop
from luthier.model.tunable import Tokens
from luthier.types import Completion, Request, Sampling

SEES_PADDING = ("encoder_repetition_penalty", "no_repeat_ngram_size")
ID_LISTS = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)  # transformers wants lists, configs have tuples
OURS = ("max_length", "forced_bos_token_id")  # settled here, not passed on
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")


Context = Callable[[], AbstractContextManager[Any]]


class HfEngine:
    """Implements `types.Engine` by transformers' batched `generate`. Greedy answers do not depend on the batch's order.

    The model's own `generation_config` is neither read (apart from its end-of-sequence ids) nor changed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokens,
        *,
        batch_size: int | None = None,
        token_budget: int = 16384,
        sink: Sink = silent,
        context: Context = nullcontext,
        stage: str = "generate",
    ) -> None:
        """Wrap a model that is already on its device.

        Args:
            model: a transformers causal language model, or a PEFT model around one.
            tokenizer: decodes answers and names the ids that end them.
            batch_size: rows a batch; None lets ``token_budget`` decide (at most 64).
            token_budget: most positions a batch, prompt and answer together, when batch_size is None.
            sink: receives progress, in rows.
            context: entered around every forward pass: autocast, a disabled adapter.
            stage: the name under which progress is reported.
        """
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.sink = sink
        self.context = context
        self.stage = stage
        self._inner: Any = self.model.get_base_model() if hasattr(model, "get_base_model") else model
        self._eos = _end_ids(tokenizer, self._inner)
        self._limit = next((int(n) for f in CONTEXT_FIELDS if (n := getattr(self._inner.config, f, None))), None)
        self._vocabulary = int(self._inner.get_input_embeddings().weight.shape[0])

    # ---------------------------------------------------------------------------------------- batches

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as batches finish, in any order; match them by key. A row that cannot be run yields an error."""
        waiting = list(requests)
        yield from progress(self.sink, self.stage, self._complete(waiting), total=len(waiting), unit="rows")

    def _complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        groups: dict[str, list[Request]] = {}
        for request in requests:
            fault = self._refusal(request)
            if fault:
                yield Completion(request.key, (), "", "error", error=fault)
            else:
                groups.setdefault(self._settings(request), []).append(request)
        for group in groups.values():
            for batch in self._batches(group):
                yield from self._run_or_halve(batch)

    def _refusal(self, request: Request) -> str | None:
        """Why this row cannot be answered, or None."""
        length = len(request.prompt_ids)
        if not length:
            return "the prompt is empty: it has no token to continue from"
        if self._limit is not None and length >= self._limit:
            return f"the prompt has {length} tokens and the model's context {self._limit}: no room for an answer"
        largest = max(request.prompt_ids)
        if largest >= self._vocabulary or min(request.prompt_ids) < 0:
            return f"the prompt holds an id outside the model's vocabulary of {self._vocabulary}"
        limit = request.sampling.extra.get("max_length")
        if limit is not None and length >= int(limit):
            return f"the prompt has {length} tokens and generation.max_length is {limit}: no room for an answer"
        return None

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Longest first, so that memory is asked for at its largest at once and the time left is not flattering."""
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.key))
        alone = ordered[0].sampling.do_sample and ordered[0].sampling.num_beams > 1
        start = 0
        while start < len(ordered):
            first = ordered[start]
            positions = (len(first.prompt_ids) + first.sampling.max_new_tokens) * first.sampling.num_beams
            rows = 1 if alone else self.batch_size or max(1, min(64, self.token_budget // positions))
            yield ordered[start : start + rows]
            start += rows

    def _run_or_halve(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Run a batch; out of memory, run its halves; a single row that does not fit completes with an error."""
        try:
            answers_rt: list[list[int]] | None = self._run(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            answers_rt = None
        if answers_rt is not None:
            yield from (self._completion(request, ids) for request, ids in zip(batch, answers_rt, strict=True))
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            yield Completion(batch[0].key, (), "", "error", error="out of memory for this row alone; shorten it")
            return
        middle = len(batch) // 2
        yield from self._run_or_halve(batch[:middle])
        yield from self._run_or_halve(batch[middle:])

    # ---------------------------------------------------------------------------------------- one batch

    def _run(
        self, batch: Sequence[Request], streamer: BaseStreamer | None = None, cancel: Any = None
    ) -> list[list[int]]:
        """Generate for one batch of equal settings; returns the new ids of each row, without padding."""
        sampling = batch[0].sampling
        device = self._inner.get_input_embeddings().weight.device
        width = max(len(request.prompt_ids) for request in batch)
        pad = self._pad()
        ids_rt = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch], device=device)
        mask_rt = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch], device=device
        )
        steps = self._steps(batch[0])
        processors = LogitsProcessorList()
        first = sampling.extra.get("forced_bos_token_id")
        if first is not None:
            processors.append(First(int(first), width))
        own_draw = sampling.do_sample and sampling.num_beams == 1
        if own_draw:
            processors.extend(warpers(sampling, str(device)))
            processors.append(Draw(batch, width, steps))
        criteria = StoppingCriteriaList()
        if sampling.stop:
            criteria.append(_StopText(self.tokenizer, sampling.stop, width))
        if cancel is not None:
            criteria.append(_Cancelled(cancel))
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_evaluating(self.model))
            stack.enter_context(_own_generation_config(self._inner))
            if sampling.do_sample and not own_draw:
                stack.enter_context(_seeded(request_seed(sampling.seed, batch[0].key), device))
            stack.enter_context(self.context())
            out_rt = self._inner.generate(
                input_ids=ids_rt,
                attention_mask=mask_rt,
                generation_config=self._generation_config(sampling, steps, own_draw),
                logits_processor=processors,
                stopping_criteria=criteria,
                streamer=streamer,
            )
        return [self._trim(row) for row in out_rt[:, width:].tolist()]

    def _settings(self, request: Request) -> str:
        """What rows of one batch share: the settings, and the new tokens that there is room for.

        Penalties on tokens already seen would see the padding too, so under them a batch has prompts of one length.
        """
        sampling = request.sampling
        repeats = sampling.repetition_penalty != 1.0 or any(sampling.extra.get(name) for name in SEES_PADDING)
        width = len(request.prompt_ids) if repeats else None
        return json.dumps([asdict(sampling), self._steps(request), width], sort_keys=True, default=repr)

    def _steps(self, request: Request) -> int:
        """New tokens for a row: as asked, and no further than `max_length` and the model's context reach."""
        length = len(request.prompt_ids)
        limits = [request.sampling.max_new_tokens]
        if self._limit is not None:
            limits.append(self._limit - length)
        if request.sampling.extra.get("max_length") is not None:
            limits.append(int(request.sampling.extra["max_length"]) - length)
        return min(limits)

    def _generation_config(self, sampling: Sampling, steps: int, own_draw: bool) -> GenerationConfig:
        settings = {k: v for k, v in sampling.extra.items() if k not in OURS}
        for name in ID_LISTS:
            if name in settings:
                settings[name] = [list(v) if isinstance(v, (list, tuple)) else v for v in settings[name]]
        if own_draw or not sampling.do_sample:  # the draw has done the warping; greedy has none to do
            settings = {k: v for k, v in settings.items() if k not in WARPERS}
        elif sampling.do_sample:
            settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if sampling.num_beams == 1:
            settings = {k: v for k, v in settings.items() if k not in ("early_stopping", "length_penalty")}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=steps,
            min_new_tokens=min(sampling.min_new_tokens, steps) or None,
            do_sample=sampling.do_sample and not own_draw,
            num_beams=sampling.num_beams,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(self._eos) or None,
            pad_token_id=self._pad(),
            **({"use_cache": True} | settings),
        )

    def _pad(self) -> int:
        pad = self.tokenizer.pad_id
        return pad if pad is not None else (self._eos[0] if self._eos else 0)

    def _trim(self, row: Sequence[int]) -> list[int]:
        """A row's ids through its first end-of-sequence id; what follows is padding."""
        end = next((at for at, token in enumerate(row) if token in self._eos), None)
        return list(row) if end is None else list(row[: end + 1])

    def _completion(self, request: Request, ids: list[int]) -> Completion:
        """The answer as text. ``ids`` keeps the end-of-sequence id where the model wrote one; the text does not."""
        ended = bool(ids) and ids[-1] in self._eos
        sampling = request.sampling
        if sampling.stop:
            ids, stopped = self._ids_to_stop(ids, sampling.stop)
            ended = ended and not stopped
        else:
            stopped = False
        text, _ = cut_at_stop(self.tokenizer.decode(ids[:-1] if ended else ids), sampling.stop)
        return Completion(request.key, tuple(ids), text, "stop" if ended or stopped else "length")

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

    # ---------------------------------------------------------------------------------------- streaming

    def stream(self, request: Request) -> Iterator[str]:
        """The answer to one request in whole characters, as it grows; closing the iterator stops the model.

        Beam search knows its answer only at the end, so it arrives in one piece.

        Raises:
            ValueError: the request cannot be run; the message says why.
        """
        fault = self._refusal(request)
        if fault:
            raise ValueError(fault)
        if request.sampling.num_beams > 1:
            yield self._completion(request, self._run([request])[0]).text
            return
        tokens = _TokenQueue(len(request.prompt_ids))
        cancel = threading.Event()
        worker = threading.Thread(target=self._work, args=(request, tokens, cancel), name="luthier-stream", daemon=True)
        worker.start()
        text = IncrementalText(self.tokenizer.decode, request.sampling.stop)
        try:
            for token in tokens:
                if token in self._eos:
                    break
                piece = text.push(token)
                if piece:
                    yield piece
                if text.stopped:
                    break
            rest = text.finish()
            if rest:
                yield rest
        finally:
            cancel.set()
            worker.join()

    def _work(self, request: Request, tokens: _TokenQueue, cancel: threading.Event) -> None:
        try:
            self._run([request], streamer=tokens, cancel=cancel)
        except BaseException as error:  # carried to the thread that reads, which raises it
            tokens.fail(error)
        else:
            tokens.end()


# ------------------------------------------------------------------------------------------------ helpers


class _TokenQueue(BaseStreamer):  # type: ignore[misc]
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


class _StopText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row as soon as its answer holds a stop string."""

    def __init__(self, tokenizer: Tokens, stops: Sequence[str], width: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._width = width
        # A character takes at most four tokens, one a byte; a little more for the join with what precedes.
        self._window = 4 * max(map(len, stops)) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        start = max(self._width, input_ids.shape[1] - self._window)
        done = [cut_at_stop(self._tokenizer.decode(row), self._stops)[1] for row in input_ids[:, start:].tolist()]
        return torch.tensor(done, device=input_ids.device)


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends every row once the reader has gone."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)


def _end_ids(tokenizer: Tokens, model: Any) -> tuple[int, ...]:
    """The tokenizer's end-of-turn ids, then those of the model's generation_config."""
    own = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    more = [] if own is None else own if isinstance(own, (list, tuple)) else [own]
    return tuple(dict.fromkeys(int(token) for token in [*tokenizer.eos_ids, *more]))


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the while; every module gets back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Hide the model's generation_config: `generate` would fill our unset keys from it."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random state, seeded for the while and put back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
