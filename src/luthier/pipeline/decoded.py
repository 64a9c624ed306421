"""Luthier's own way to run a model: the packed decoder with its adapters, trained and asked with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.events import Sink, silent
from luthier.model.adapters import RECORD
from luthier.model.decoder.adapter import Adapter
from luthier.model.decoder.decoder import Decoder, Execution
from luthier.model.decoder.save import save_adapter, save_weights
from luthier.model.tunable import Tokens, no_base
from luthier.run import atomic
from luthier.run.folder import ADAPTER, WEIGHTS
from luthier.types import Base, Batch, Engine, Plan

Tuned = Literal["adapter", "weights", "nothing"]  # what is tuned of a model


class Decoded:
    """Implements `model.tunable.Tunable` over the decoder."""

    def __init__(
        self, decoder: Decoder, base: Base, tuned: Tuned, *, adapter: Any = None, generic: bool = False
    ) -> None:
        """``adapter``: the config's section that the adapter was made from, where ``tuned`` is "adapter".

        ``generic``: transformers' `generate` answers, over the same decoder.
        """
        self.decoder, self.base, self.tuned, self.adapter, self.generic = decoder, base, tuned, adapter, generic
        self.shares = True

    @property
    def module(self) -> nn.Module:
        """The decoder; its parameters are the adapter's, or all weights."""
        return self.decoder

    @property
    def has_base(self) -> bool:
        """Whether the base can still be asked."""
        return self.tuned != "weights"

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """[n] log-probabilities of the supervised targets, with gradient."""
        return self.decoder.logprobs(batch)

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] the same without gradient, and whether each target was the likeliest token."""
        return self.decoder.score(batch)

    def penalty(self) -> None:
        """None: low-rank pairs have no term of their own."""

    def after_update(self, step: int) -> None:
        """Nothing: the compute copies follow the weights before the next pass."""

    def state(self) -> dict[str, Any]:
        """Nothing beside the weights."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def base_only(self) -> AbstractContextManager[Any]:
        """The adapter is off while it is open. Raises RunError when all weights were tuned."""
        if self.tuned == "adapter":
            return self.decoder.without_adapter()
        if self.tuned == "nothing":
            return nullcontext()
        raise no_base()

    def engine(
        self,
        tokenizer: Tokens,
        *,
        batch_size: int | None = None,
        use_base: bool = False,
        adapters: Mapping[str, Adapter] | None = None,
        sink: Sink = silent,
    ) -> Engine:
        """Generation with the weights and the adapter of training, or with those of ``adapters`` that requests name."""
        from luthier.infer.engine import DecoderEngine

        if use_base and not self.has_base:
            self.base_only()  # raises, and says why
        own = DecoderEngine(
            self.decoder, tokenizer,
            batch_size=batch_size, use_base=use_base, adapters=adapters, sink=sink, context=self.base.spec.context,
        )  # fmt: skip
        return own.by_transformers(sink=sink) if self.generic and not adapters else own

    def adopt(self, plan: Plan) -> None:
        """Execute another plan from the next pass on."""
        self.decoder.execute(execution_of(plan))

    def save(self, folder: Path) -> Path:
        """The adapter in PEFT's format, or the whole model where all of it was trained."""
        record = {"format": 1, "base": self.base.name, "base_hash": self.base.content_hash}
        target = folder / (ADAPTER if self.tuned == "adapter" else WEIGHTS)
        if self.tuned == "adapter":
            save_adapter(self.decoder, self.adapter, target, self.base.name)
        else:
            stored = getattr(torch, self.base.spec.dtype, torch.float32)
            save_weights(self.decoder, self.base.path, target, stored)
        atomic.write_json(target / RECORD, record)
        return target


def execution_of(plan: Plan) -> Execution:
    """The part of a plan that the decoder carries out pass by pass."""
    return Execution(
        attention=plan.attention,
        recompute_layers=plan.recompute_layers,
        offload=plan.offload_checkpoints,
        mlp_tile=plan.mlp_tile,
        loss_chunk=plan.loss_chunk,
        graphs=plan.graphs,
        tokens=plan.tokens_per_pass,
        multiple=plan.pad_to_multiple_of,
    )
