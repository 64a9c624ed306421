"""Supervised fine-tuning: the weighted negative log-likelihood of the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from luthier.objectives.terms import Loss, Term
from luthier.types import Batch, Example

if TYPE_CHECKING:
    import torch


class Sft:
    """``token``: the mean over supervised tokens of the effective batch; ``sample``: over samples of their means.

    ``micro_batch`` is ``token`` over examples that their source has weighed so (`data.source.weighed`).
    """

    def __init__(self, normalization: Literal["token", "sample", "micro_batch"] = "token") -> None:
        self.normalization = normalization

    def prepare(self, step: Sequence[Example]) -> Mapping[str, float]:
        """The sum of target weights of the effective batch, or (sample) the number of its supervised samples."""
        sums = [sum(example.weights[1:]) for example in step]  # nothing precedes the first token, so it has no target
        weight = float(sum(1 for one in sums if one)) if self.normalization == "sample" else sum(sums)
        assert weight > 0, "data/prepare drops rows without a supervised token"
        return {"nll": weight}

    def loss(self, logprobs: torch.Tensor, batch: Batch, constants: Mapping[str, float]) -> Loss:
        """One term, ``nll``; statistics ``tokens`` and ``nll``, the plain sums over supervised tokens."""
        trained = batch.supervised if batch.supervised is not None else batch.target_weight.nonzero().squeeze(-1)
        weights = batch.target_weight[trained].float()  # on the host, as the batch is
        if self.normalization == "sample":
            segment = batch.segment[trained]
            totals = weights.new_zeros(len(batch.lengths)).index_add_(0, segment, weights)
            weights = weights / totals[segment]
        negative, total = -logprobs.float(), float(weights.sum())
        nll = (negative * weights.to(logprobs.device, non_blocking=True)).sum()
        statistics = {"tokens": logprobs.new_full((), len(trained)), "nll": negative.detach().sum()}
        return Loss({"nll": Term(nll, logprobs.new_full((), total))}, statistics)
