"""What changes while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from luthier.train.precision import scaler
from luthier.train.setup import Setup
from luthier.types import Plan


@dataclass
class Training:
    """What changes while training; everything that is declared stands in the `Setup`."""

    optimizer: torch.optim.Optimizer
    plan: Plan
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps that are finished
    rows: tuple[int, ...] = ()  # of the step that was begun last
    skipped: int = 0  # updates skipped in a row
    torn: bool = False  # an update was broken off: some weights may be new and others not
    rate_scale: float = 1.0  # what reduce-on-plateau has made of the learning rate
    told: bool = False  # what of the model draws over a whole pass, whatever its samples


def new_training(setup: Setup, optimizer: torch.optim.Optimizer) -> Training:
    """The state before the first step."""
    return Training(optimizer, setup.plan, scaler(setup.precision, setup.plan.device))
