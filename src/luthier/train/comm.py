"""What training asks of other ranks. On one rank: nothing. Several are `luthier.parallel`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

    def sum_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of ``weights`` by their sums over all ranks, in fp32, the same bits on each."""
        ...

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give all ranks what rank 0 has in ``tensors``."""
        ...

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (JSON types), on all ranks."""
        ...

    def made_by_first(self, make: Callable[[], Any], received: Sequence[int], pass_on: Callable[[int], None]) -> Any:
        """What ``make()`` gives on rank 0 (JSON types), on all ranks.

        A signal that another rank has ``received`` meanwhile is told rank 0 by ``pass_on``, in another thread.
        """
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

    def sum_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """They are the sums already."""

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """All ranks have it."""

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def made_by_first(self, make: Callable[[], Any], received: Sequence[int], pass_on: Callable[[int], None]) -> Any:
        """What is made."""
        return make()

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""
