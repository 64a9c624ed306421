"""Watches the loss for a jump: a step far above the last ones, by a rule that outliers do not move."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from luthier.train.hooks import NOTHING, Decision

LEAST_MAD = 0.01  # of the median: losses that hardly move are no reason to call the next one a spike


class Spike:
    """A loss above median + ``threshold`` × MAD of the last ``window`` steps is a spike; `trainer.on_spike` decides."""

    def __init__(self, window: int, threshold: float, *, rewind: bool) -> None:
        self.threshold, self.rewind = threshold, rewind
        self.losses: deque[float] = deque(maxlen=window)
        self.spiking = False

    @property
    def bound(self) -> float:
        """The loss above which the next step is a spike; infinite until the window is full."""
        if len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        middle = median(self.losses)
        spread = median(abs(loss - middle) for loss in self.losses)
        return middle + self.threshold * max(spread, LEAST_MAD * abs(middle))

    def after_step(self, step: int, loss: float) -> Decision:
        """A warning where a spike begins, or the wish to rewind. A loss that is not finite is not its business."""
        if not math.isfinite(loss):
            return NOTHING
        bound, before = self.bound, self.spiking
        self.spiking = loss > bound
        self.losses.append(loss)
        if not self.spiking or (before and not self.rewind):
            return NOTHING
        text = f"the loss of step {step} jumped to {loss:.4f}, above the {bound:.4f} that trainer.on_spike allows"
        return Decision(rewind=text) if self.rewind else Decision(warn=text)

    def after_evaluation(self, step: int, values: Mapping[str, float]) -> Decision:
        """Nothing."""
        return NOTHING

    def state(self) -> dict[str, Any]:
        """The losses of the window."""
        return {"losses": list(self.losses), "spiking": self.spiking}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.spiking = state["spiking"]
