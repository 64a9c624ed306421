"""What changes while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from luthier.model.dropout import drawn_by_pass
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
    by_pass: bool = False  # some of the model draws over a whole pass, whatever its samples


def new_training(setup: Setup, optimizer: torch.optim.Optimizer) -> Training:
    """The state before the first step."""
    own = scaler(setup.precision, setup.plan.device)
    return Training(optimizer, setup.plan, own, by_pass=bool(drawn_by_pass(setup.model)))
