"""The generic way to run a model: transformers' own forward, PEFT's adapters, batched `generate`. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.events import Sink, silent
from luthier.infer.generate import HfEngine
from luthier.infer.memory import free_bytes
from luthier.model import adapters
from luthier.model.adalora import AdaLora
from luthier.model.adapted import switched_off
from luthier.model.generic import GenericModel
from luthier.model.tunable import Tokens, no_base
from luthier.plan.slots import Sizes, positions_of
from luthier.run.folder import ADAPTER, WEIGHTS
from luthier.train.precision import Precision, autocast
from luthier.types import Base, Batch, Plan

Tuned = Literal["adapter", "weights", "nothing"]  # what is tuned of a model


class Generic(GenericModel):
    """Implements `model.tunable.Tunable` over a transformers model, or a PEFT model around one."""

    def __init__(
        self,
        module: nn.Module,
        base: Base,
        tuned: Tuned,
        *,
        precision: Precision,
        device: str,
        checkpointing: bool = False,
        neftune_alpha: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Wrap ``module``, which is on ``device``; ``tuned`` says what of it is, or will be, other than ``base``."""
        super().__init__(module, checkpointing=checkpointing, neftune_alpha=neftune_alpha, seed=seed)
        self.base = base
        self.shares = False
        self.tuned = tuned
        self.precision: Precision = precision
        self.device = device
        self._adalora = AdaLora.of(module)

    @property
    def module(self) -> nn.Module:
        """The transformers or PEFT model."""
        return self.model

    @property
    def has_base(self) -> bool:
        """Whether the base can still be asked."""
        return self.tuned != "weights"

    def logprobs(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """As `GenericModel.logprobs`, in the declared arithmetic."""
        with autocast(self.precision, self.device):
            return super().logprobs(batch, positions)

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GenericModel.score`, in the declared arithmetic."""
        with autocast(self.precision, self.device):
            return super().score(batch)

    def base_only(self) -> AbstractContextManager[Any]:
        """The adapter is off while it is open. Raises RunError when all weights were tuned."""
        if self.tuned == "adapter":
            return switched_off(self.model)
        if self.tuned == "nothing":
            return nullcontext()
        raise no_base()

    def engine(
        self, tokenizer: Tokens, *, batch_size: int | None = None, use_base: bool = False, sink: Sink = silent
    ) -> HfEngine:
        """Transformers' `generate`, in the arithmetic of training."""

        @contextmanager
        def context() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(autocast(self.precision, self.device))
                stack.enter_context(self.base_only() if use_base else nullcontext())
                yield

        sizes = Sizes.of(self.base.spec, next(self.module.parameters()).dtype.itemsize)
        positions = positions_of(sizes, self.device.split(":")[0], free_bytes(torch.device(self.device)))
        return HfEngine(
            self.model, tokenizer, batch_size=batch_size, sink=sink, context=context, positions=positions
        )  # fmt: skip

    def adopt(self, plan: Plan) -> None:
        """Recompute activations if the plan says so; passes are cut outside."""
        if plan.checkpointing:
            self.recompute()

    def penalty(self) -> torch.Tensor | None:
        """AdaLoRA's; other adapters have none."""
        return self._adalora.penalty() if self._adalora is not None else None

    def after_update(self, step: int) -> None:
        """AdaLoRA moves its ranks."""
        if self._adalora is not None:
            self._adalora.after_update(step)

    def state(self) -> dict[str, Any]:
        """AdaLoRA's; everything else stands in the weights."""
        return self._adalora.state() if self._adalora is not None else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if self._adalora is not None:
            self._adalora.restore(state)

    def save(self, folder: Path) -> Path:
        """The adapter in PEFT's format, or the whole model where all of it was trained."""
        model: Any = self.model
        if self.tuned == "adapter":
            adapters.save_adapter(model, folder / ADAPTER, self.base)
            return folder / ADAPTER
        adapters.save_weights(model, folder / WEIGHTS, self.base)
        return folder / WEIGHTS
