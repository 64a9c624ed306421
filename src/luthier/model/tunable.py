"""What the rest of Luthier knows of a model: something that is trained, asked and saved, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import RunError
from luthier.events import Sink, silent
from luthier.types import Base, Batch, Engine, Plan

if TYPE_CHECKING:
    import torch


class Tokens(Protocol):
    """What generation asks of `luthier.assets.tokenizer.Tokenizer`."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Every id that ends an answer."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The id that fills the left of shorter rows; masked, so any id serves."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens left out."""
        ...


class Tunable(Protocol):
    """A model with what is trained of it. `pipeline.opening` makes one; `train/` and `Tuned` use nothing else.

    Another way to run a model (other kernels, other LoRA slots, another loader) is another class of this shape.
    """

    @property
    def module(self) -> torch.nn.Module:
        """Its parameters with requires_grad are what is trained, kept in checkpoints and put back."""
        ...

    @property
    def base(self) -> Base:
        """The model that it started from."""
        ...

    @property
    def shares(self) -> bool:
        """Whether what samples of a pass start with in common may be laid out once (`collate` with ``share``)."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether the model it started from can still be asked (not after all weights were trained)."""
        ...

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """[n] fp32 with gradient, computed in the declared precision: the log-probability of each supervised target.

        They come in the order of the nonzeros of ``target_weight``.
        """
        ...

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] the same log-probabilities, and [n] whether each target was the likeliest token."""
        ...

    def penalty(self) -> torch.Tensor | None:
        """A term of the weights alone (with gradient) that each step adds once, or None."""
        ...

    def after_update(self, step: int) -> None:
        """Update number ``step`` (from 1) has been made; its gradients are still there."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What `restore` needs beside the trained weights to go on as if never stopped: tensors and JSON types."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...

    def engine(
        self, tokenizer: Tokens, *, batch_size: int | None = None, use_base: bool = False, sink: Sink = silent
    ) -> Engine:
        """Generation with these weights, or with the base's. ``batch_size`` rows at once; None: as memory allows."""
        ...

    def base_only(self) -> AbstractContextManager[Any]:
        """While it is open, the model is the base. Only where `has_base` holds."""
        ...

    def adopt(self, plan: Plan) -> None:
        """Execute another plan from the next pass on: more recomputed layers, when memory has run out."""
        ...

    def save(self, folder: Path) -> Path:
        """Write what was trained below a run folder: ``adapter/``, or ``weights/`` of a whole model. Returns which."""
        ...


def no_base() -> RunError:
    """What `Tunable.base_only` raises where the base is gone."""
    return RunError(
        "run-not-a-run",
        "all weights were tuned: the base model is not in this run",
        received="a run with adapter: null",
        allowed="a run that trained an adapter",
        fix="compare with a run of `trainer.type: none` on the same base",
    )
