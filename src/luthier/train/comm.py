"""What training asks of other ranks. On one rank: nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Comm(Protocol):
    """Sum and agreement over ranks."""

    @property
    def rank(self) -> int:
        """The number of this process."""
        ...

    @property
    def world(self) -> int:
        """How many processes there are."""
        ...

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of ``value`` over all ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...


@dataclass(frozen=True)
class OneRank:
    """The `Comm` of a run in one process."""

    rank: int = 0
    world: int = 1

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself."""
        return value

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""
