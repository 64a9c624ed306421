"""The machine and the plan: how a config is executed here. Pure, without torch."""

from luthier.plan.machine import probe
from luthier.plan.planner import device_of, make_plan

__all__ = ["device_of", "make_plan", "probe"]
