"""What an objective returns: terms that the training step sums, weighs and divides, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from luthier.types import Batch, Example

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a loss over one pass: the sum of its entries (with gradient) and the sum of their weights.

    The step's loss is Σ coefficient · (Σ sum over passes) / (global weight of that name).
    """

    sum: torch.Tensor  # scalar
    weight: torch.Tensor  # scalar, no gradient
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """The terms of one pass by name, and statistics that add up over passes."""

    terms: Mapping[str, Term]
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is learned. Pure: never logs, never talks to other ranks, never makes the host wait for the device."""

    def prepare(self, step: Sequence[Example]) -> Mapping[str, float]:
        """The global weight of each term over the effective batch, known before any backward pass."""
        ...

    def loss(self, logprobs: torch.Tensor, batch: Batch, constants: Mapping[str, float]) -> Loss:
        """The terms of one pass. ``logprobs`` [n]: one for each nonzero of ``batch.target_weight``, in order.

        They are on the device; the batch is on the host, and the terms take of it to the device what they need.
        """
        ...
