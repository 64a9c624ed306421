"""How probable a model finds given answers: the probability of what it wrote, or of each class it may choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.events import Sink, progress, silent
from luthier.model.tunable import Tunable
from luthier.types import Example, Plan

TOKENS_PER_PASS = 4096


def logprobs_of(
    model: Tunable, examples: Sequence[Example], *, tokens_per_pass: int = TOKENS_PER_PASS, sink: Sink = silent
) -> list[list[float]]:
    """For each example, the log-probability of every supervised token, in order. The training mode is put back."""
    plan = Plan(device="", tokens_per_pass=tokens_per_pass)
    found: list[list[float]] = [[] for _ in examples]
    module = model.module
    training = [one for one in module.modules() if one.training]
    passes = schedule([example.length for example in examples], plan)[0]
    module.eval()
    try:
        with torch.no_grad():
            for indices in progress(sink, "score", passes, unit="passes"):
                batch = collate([examples[i] for i in indices])  # the model moves what it needs
                owners = batch.segment[batch.target_weight != 0].tolist()
                for owner, value in zip(owners, model.logprobs(batch).tolist(), strict=True):
                    found[indices[owner]].append(value)
    finally:
        for one in training:
            one.training = True
    return found


def normalised(totals: Sequence[float]) -> list[float]:
    """Log-probabilities of alternatives as probabilities that sum to 1."""
    most = max(totals)
    weights = [math.exp(total - most) for total in totals]
    return [weight / sum(weights) for weight in weights]
