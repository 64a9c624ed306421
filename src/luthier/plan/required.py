"""The plan that a run needs, or the refusal that says what would make it fit."""

from __future__ import annotations

from typing import Any

from luthier.errors import TrainingError
from luthier.plan.planner import Planned, best
from luthier.plan.remedies import refusal
from luthier.plan.support import BUILT, Engine
from luthier.types import DataStats, Machine, ModelSpec, Plan


def make_plan(config: Any, spec: ModelSpec, stats: DataStats, machine: Machine, *, engine: Engine = BUILT) -> Plan:
    """The plan alone. Raises as `plan_for`."""
    return plan_for(config, spec, stats, machine, engine=engine).plan


def plan_for(
    config: Any,
    spec: ModelSpec,
    stats: DataStats,
    machine: Machine,
    *,
    engine: Engine = BUILT,
    measured: tuple[float, float] | None = None,
) -> Planned:
    """As `planner.best`, where a plan fits. Raises TrainingError training-no-memory when none does."""
    found = best(config, spec, stats, machine, engine=engine, measured=measured)
    if found.fits:
        return found
    raise TrainingError([refusal(config, spec, stats, machine, engine, found)])
