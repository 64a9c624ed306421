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
from luthier.infer.answer import Answers, is_out_of_memory
from luthier.infer.constrain import KINDS
from luthier.infer.drawing import WARPERS, Constrained, Draw, First, request_seed, warpers
from luthier.infer.rules import lists
from luthier.model.tunable import Tokens
from luthier.types import Completion, Request, Sampling

SEES_PADDING = ("encoder_repetition_penalty", "no_repeat_ngram_size")
ID_LISTS = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
)  # transformers wants lists, configs have tuples
OURS = ("max_length", "forced_bos_token_id", *KINDS)  # settled here, not passed on
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
        self.answers = Answers(
            tokenizer,
            _end_ids(tokenizer, self._inner),
            next((int(n) for f in CONTEXT_FIELDS if (n := getattr(self._inner.config, f, None))), None),
            int(self._inner.get_input_embeddings().weight.shape[0]),
        )

    # ---------------------------------------------------------------------------------------- batches

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as batches finish, in any order; match them by key. A row that cannot be run yields an error."""
        waiting = list(requests)
        yield from progress(self.sink, self.stage, self._complete(waiting), total=len(waiting), unit="rows")

    def _complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        groups: dict[str, list[Request]] = {}
        for request in requests:
            fault = self.answers.refusal(request)
            if fault:
                yield Completion(request.key, (), "", "error", error=fault)
            else:
                groups.setdefault(self._settings(request), []).append(request)
        for group in groups.values():
            for batch in self._batches(group):
                yield from self._run_or_halve(batch)

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
            if not is_out_of_memory(error):
                raise
            answers_rt = None
        if answers_rt is not None:
            yield from (self.answers.completion(request, ids) for request, ids in zip(batch, answers_rt, strict=True))
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
        pad = self.answers.pad
        ids_rt = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch], device=device)
        mask_rt = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch], device=device
        )
        steps = self.answers.steps(batch[0])
        processors = LogitsProcessorList()
        first = sampling.extra.get("forced_bos_token_id")
        if first is not None:
            processors.append(First(int(first), width))
        paths = [path for path in map(self.answers.path, batch) if path is not None]
        if paths:
            processors.append(Constrained(paths, width))
        own_draw = sampling.do_sample and sampling.num_beams == 1
        if own_draw:
            processors.extend(warpers(sampling, str(device)))
            processors.append(Draw(batch, width, steps))
        criteria = StoppingCriteriaList()
        if sampling.stop:
            criteria.append(_StopText(self.answers, sampling.stop, width))
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
        return [self.answers.trim(row) for row in out_rt[:, width:].tolist()]

    def _settings(self, request: Request) -> str:
        """What rows of one batch share: the settings, and the new tokens that there is room for.

        Penalties on tokens already seen would see the padding too, so under them a batch has prompts of one length.
        """
        sampling = request.sampling
        repeats = sampling.repetition_penalty != 1.0 or any(sampling.extra.get(name) for name in SEES_PADDING)
        width = len(request.prompt_ids) if repeats else None
        return json.dumps([asdict(sampling), self.answers.steps(request), width], sort_keys=True, default=repr)

    def _generation_config(self, sampling: Sampling, steps: int, own_draw: bool) -> GenerationConfig:
        settings = {k: v for k, v in sampling.extra.items() if k not in OURS}
        for name in ID_LISTS:
            if name in settings:
                settings[name] = lists(settings[name])
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
            eos_token_id=list(self.answers.ends) or None,
            pad_token_id=self.answers.pad,
            **({"use_cache": True} | settings),
        )

    # ---------------------------------------------------------------------------------------- streaming

    def stream(self, request: Request) -> Iterator[str]:
        """The answer to one request in whole characters, as it grows; closing the iterator stops the model.

        Beam search knows its answer only at the end, so it arrives in one piece.

        Raises:
            ValueError: the request cannot be run; the message says why.
        """
        fault = self.answers.refusal(request)
        if fault:
            raise ValueError(fault)
        if request.sampling.num_beams > 1:
            yield self.answers.completion(request, self._run([request])[0]).text
            return
        tokens = _TokenQueue(len(request.prompt_ids))
        cancel = threading.Event()
        worker = threading.Thread(target=self._work, args=(request, tokens, cancel), name="luthier-stream", daemon=True)
        worker.start()
        try:
            yield from self.answers.pieces(request, iter(tokens))
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

    def __init__(self, answers: Answers, stops: Sequence[str], width: int) -> None:
        self._answers, self._stops, self._width = answers, stops, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = [self._answers.has_stop(row, self._stops) for row in input_ids[:, self._width :].tolist()]
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
