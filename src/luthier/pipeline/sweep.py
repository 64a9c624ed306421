"""`luthier plan --sweep`: a need on each card of the table; one that refuses it says why, and the others follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import LuthierError
from luthier.pipeline.planning import Estimate, Need
from luthier.plan import estimate, planner
from luthier.plan.cards import CARDS, Card, imagined

OWN = {"memory_limit": None, "host_memory_limit": None, "device": "auto"}  # pins that belong to one machine


@dataclass(frozen=True, slots=True)
class Swept:
    """A card with what the need takes on it, or why it is refused there."""

    gpu: str
    found: Estimate | None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        if self.found is None:
            return {"gpu": self.gpu, "fits": False, "refused": self.refused}
        return {"gpu": self.gpu, **self.found.to_json()}


@dataclass(frozen=True, slots=True)
class Sweep:
    """A need on each card. ``left_out``: lines of its config that belong to one machine, so the sweep does without."""

    cards: tuple[Swept, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, need: Need) -> Sweep:
        """Plan for every card, without the search for remedies."""
        execution = need.config.execution
        left = [
            f"execution.{key}: {getattr(execution, key)}"
            for key, free in OWN.items()
            if getattr(execution, key) != free
        ]
        config = need.config.model_copy(update={"execution": execution.model_copy(update=OWN)})
        return cls(tuple(_on(card, replace(need, config=config)) for card in CARDS), tuple(left))

    @property
    def notes(self) -> list[str]:
        """What has to be said of it."""
        return [f"the sweep is without {' and '.join(self.left_out)}, of one machine"] if self.left_out else []

    def to_json(self) -> list[dict[str, Any]]:
        """The cards as JSON types."""
        return [one.to_json() for one in self.cards]


def _on(card: Card, need: Need) -> Swept:
    machine = imagined(card)
    try:
        found = planner.best(need.config, need.base.spec, need.stats, machine, engine=need.engine)
    except LuthierError as error:
        return Swept(card.name, None, "; ".join(fault.message for fault in error.faults))
    return Swept(card.name, Estimate(need, machine, found, estimate.times(found, need.held), ()))
