"""The generation engine over any transformers or PEFT causal language model: batched, keyed, seeded, streaming.

    requests → refused ones complete with an error → grouped by settings, sorted by length → batches → generate

Shapes in names: ``r`` rows of a batch, ``t`` positions, ``v`` vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from luthier.errors import Fault
from luthier.events import Sink, progress, silent
from luthier.infer.answer import Answers, is_out_of_memory
from luthier.infer.drawing import WARPERS, Constrained, Counted, Draw, First, request_seed, warpers
from luthier.infer.grammar import KINDS
from luthier.infer.listening import Cancelled, Record, StopText, TokenQueue
from luthier.infer.rules import lists, sequence_bias
from luthier.infer.several import completed, expanded
from luthier.infer.words import banned_ids
from luthier.model.generic import stretched_by_length
from luthier.model.tunable import Tokens
from luthier.plan.slots import POSITIONS
from luthier.types import Completion, Request, Sampling

SEES_PADDING = ("encoder_repetition_penalty", "no_repeat_ngram_size")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # transformers wants lists, configs have tuples
OURS = ("max_length", "forced_bos_token_id", "logit_bias", "bad_words", *KINDS)  # settled here, not passed on
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
        positions: int = POSITIONS,
        sink: Sink = silent,
        context: Context = nullcontext,
        stage: str = "generate",
    ) -> None:
        """Wrap a model that is already on its device.

        Args:
            model: a transformers causal language model, or a PEFT model around one.
            tokenizer: decodes answers and names the ids that end them.
            batch_size: rows a batch; None lets ``positions`` decide (at most 64).
            positions: most of a batch, prompt and answer together, when batch_size is None.
            sink: receives progress, in rows.
            context: entered around every forward pass: autocast, a disabled adapter.
            stage: the name under which progress is reported.
        """
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.positions = positions
        self.sink = sink
        self.context = context
        self.stage = stage
        self._inner: Any = self.model.get_base_model() if hasattr(model, "get_base_model") else model
        self._stretched = stretched_by_length(self._inner.config)  # a longer row beside it would change an answer
        self.answers = Answers(
            tokenizer,
            _end_ids(tokenizer, self._inner),
            next((int(n) for f in CONTEXT_FIELDS if (n := getattr(self._inner.config, f, None))), None),
            int(self._inner.get_input_embeddings().weight.shape[0]),
        )

    # ---------------------------------------------------------------------------------------- batches

    def refusal(self, request: Request) -> Fault | None:
        """Why this request cannot be answered, or None."""
        return self.answers.refusal(request)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as batches finish, in any order; match them by key. A row that cannot be run yields an error.

        Several answers to a prompt come as one completion.
        """
        waiting = list(requests)
        done = completed(waiting, self.refusal, self._answers)
        yield from progress(self.sink, self.stage, done, total=len(waiting), unit="rows")

    def _answers(self, requests: Sequence[Request]) -> Iterator[Completion]:
        groups: dict[str, list[Request]] = {}
        for request in requests:
            groups.setdefault(self._settings(request), []).append(request)
        for group in groups.values():
            for batch in self._batches(group):
                yield from self._run_or_halve(batch)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Longest first, so that memory is asked for at its largest at once and the time left is not flattering."""
        ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.key, r.number))
        alone = (ordered[0].sampling.do_sample and ordered[0].sampling.num_beams > 1) or self._stretched
        start = 0
        while start < len(ordered):
            first = ordered[start]
            positions = (len(first.prompt_ids) + first.sampling.max_new_tokens) * first.sampling.num_beams
            rows = 1 if alone else self.batch_size or max(1, min(64, self.positions // positions))
            yield ordered[start : start + rows]
            start += rows

    def _run_or_halve(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Run a batch; out of memory, run its halves; a single row that does not fit completes with an error."""
        try:
            answered: list[Completion] | None = self._run(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            answered = None
        if answered is not None:
            yield from answered
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            yield from (
                replace(one, finish_reason="error", error="out of memory for this row alone; shorten it")
                for one in self._completions(batch, [[]] * self._each(batch[0].sampling), None)
            )
            return
        middle = len(batch) // 2
        yield from self._run_or_halve(batch[:middle])
        yield from self._run_or_halve(batch[middle:])

    # ---------------------------------------------------------------------------------------- one batch

    def _run(
        self, batch: Sequence[Request], streamer: BaseStreamer | None = None, cancel: Any = None
    ) -> list[Completion]:
        """Generate for one batch of equal settings; the answers, row by row."""
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
        if sampling.presence_penalty or sampling.frequency_penalty:
            processors.append(Counted(sampling.presence_penalty, sampling.frequency_penalty, width))
        first = sampling.extra.get("forced_bos_token_id")
        if first is not None:
            processors.append(First(int(first), width))
        paths = [path for path in map(self.answers.path, batch) if path is not None]
        if paths:
            processors.append(Constrained(paths, width))
        own_draw = sampling.do_sample and sampling.num_beams == 1
        if own_draw:
            processors.extend(warpers(sampling, str(device)))
        record = Record(self._inner) if sampling.logprobs else None
        if record is not None:
            processors.append(record.warped)
        if own_draw:
            processors.append(Draw(batch, width, steps))
        criteria = StoppingCriteriaList()
        if record is not None:
            criteria.append(record.taken)
        if sampling.stop:
            criteria.append(StopText(self.answers, sampling.stop, width))
        if cancel is not None:
            criteria.append(Cancelled(cancel))
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_evaluating(self.model))
            stack.enter_context(_own_generation_config(self._inner))
            if sampling.do_sample and not own_draw:
                stack.enter_context(_seeded(request_seed(sampling.seed, batch[0].key, batch[0].number), device))
            stack.enter_context(self.context())
            if record is not None:
                stack.enter_context(record)
            out_rt = self._inner.generate(
                input_ids=ids_rt,
                attention_mask=mask_rt,
                generation_config=self._generation_config(sampling, steps, own_draw),
                logits_processor=processors,
                stopping_criteria=criteria,
                streamer=streamer,
            )
        rows = [self.answers.trim(row) for row in out_rt[:, width:].tolist()]
        return self._completions(batch, rows, record)

    @staticmethod
    def _each(sampling: Sampling) -> int:
        """Answers that one row of a batch brings: a beam search finds several, a draw one."""
        return sampling.n if sampling.num_beams > 1 else 1

    def _completions(
        self, batch: Sequence[Request], rows: Sequence[list[int]], record: Record | None
    ) -> list[Completion]:
        each = self._each(batch[0].sampling)
        out = []
        for at, ids in enumerate(rows):
            own, changed = (None, None) if record is None else record.of(at)
            request = batch[at // each]
            numbered = replace(request, number=at % each) if each > 1 else request
            out.append(self.answers.completion(numbered, ids, own, changed))
        return out

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
        settings |= {"sequence_bias": sequence_bias(sampling.extra), "bad_words_ids": banned_ids(sampling.extra)}
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
            num_return_sequences=self._each(sampling),
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(self.answers.ends) or None,
            pad_token_id=self.answers.pad,
            **({"use_cache": True} | settings),
        )

    # ---------------------------------------------------------------------------------------- streaming

    def stream(self, request: Request) -> Generator[str, None, None]:
        """The answer to one request in whole characters, as it grows; closing the iterator stops the model.

        Beam search knows its answer only at the end, so it arrives in one piece. Of several answers this is the first.

        Raises:
            ValueError: the request cannot be run; the message says why.
        """
        fault = self.refusal(request)
        if fault:
            raise ValueError(fault.message)
        if request.sampling.num_beams > 1:
            yield self._run([request])[0].text
            return
        tokens = TokenQueue(len(request.prompt_ids))
        cancel = threading.Event()
        worker = threading.Thread(target=self._work, args=(request, tokens, cancel), name="luthier-stream", daemon=True)
        worker.start()
        try:
            yield from self.answers.pieces(request, iter(tokens))
        finally:
            cancel.set()
            worker.join()

    def stream_several(self, request: Request) -> Iterator[tuple[int, str]]:
        """All answers to one request, one after the other: pieces of text, each with its answer's number.

        Raises:
            ValueError: as `stream`.
        """
        if request.sampling.num_beams > 1:
            done = next(iter(self.generate([request])))
            if done.error:
                raise ValueError(done.error)
            yield from ((one.number, one.text) for one in (done, *done.others))
            return
        for one in expanded([request]):
            with closing(self.stream(one)) as pieces:
                for piece in pieces:
                    yield one.number, piece

    def _work(self, request: Request, tokens: TokenQueue, cancel: threading.Event) -> None:
        try:
            self._run([request], streamer=tokens, cancel=cancel)
        except BaseException as error:  # carried to the thread that reads, which raises it
            tokens.fail(error)
        else:
            tokens.end()


# ------------------------------------------------------------------------------------------------ helpers


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
