"""Loss, perplexity and token accuracy over held-out examples, without moving the training's random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from luthier.data.collate import collate
from luthier.events import Sink, progress, silent
from luthier.train.setup import Passes, Runner
from luthier.types import Batch, Example, Plan

# Batch → log-probability of each supervised target, and whether it was the likeliest token (None: not known)
Scored = Callable[[Batch], tuple[torch.Tensor, torch.Tensor | None]]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode with random numbers of its own; the mode and the generators come back as they were."""
    before = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(before)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Call it for the values of one evaluation: ``loss``, ``perplexity``, ``supervised_tokens``, ``token_accuracy``.

    The loss is weighted over supervised tokens as training's is. ``generated`` adds metrics on generated answers.
    ``tokens_per_s`` counts all tokens of the rows, as a training step's does, over the time of the passes alone.
    """

    model: torch.nn.Module
    score: Scored
    examples: Sequence[Example]
    max_rows: int | None = None
    generated: Callable[[], Mapping[str, float]] | None = None
    sink: Sink = field(default=silent)

    def __call__(self, passes_of: Runner) -> dict[str, float]:
        """Evaluate now, in the passes that ``passes_of`` cuts. At least one example must be there."""
        examples = self.examples[: self.max_rows]
        assert examples, "an evaluation needs an example; leave Setup.evaluate out otherwise"
        with evaluating(self.model):
            sums, known, seconds = passes_of(examples, self._run)
            extra = dict(self.generated()) if self.generated is not None else {}
        nll_sum, weight, hit, tokens = sums.tolist()
        loss = nll_sum / weight
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": tokens}
        if known:
            values["token_accuracy"] = hit / tokens
        values["tokens_per_s"] = sum(example.length for example in examples) / seconds
        return {**values, **extra}

    def _run(self, passes: Passes, plan: Plan) -> tuple[torch.Tensor, bool, float]:
        """[4] summed weighted negative log-likelihood, weight, hits and tokens; whether hits are known; seconds."""
        sums, known = torch.zeros(4, dtype=torch.float64), True
        started = time.perf_counter()
        for examples in progress(self.sink, "evaluate", passes, unit="passes"):
            batch = collate(examples, share=plan.share_prefix)
            logprobs, top = self.score(batch)
            weights = batch.target_weight[batch.target_weight != 0].double()
            hits = torch.zeros(()) if top is None else top.sum().cpu()
            known = known and top is not None
            nll = -(logprobs.double().cpu() * weights).sum()
            sums += torch.stack([nll, weights.sum(), hits.double(), torch.tensor(float(len(weights)))])
        return sums, known, time.perf_counter() - started  # each pass has been read from the device
