"""The machine and the plan: how a config is executed here, what it takes, and why. Pure, without torch."""

from luthier.plan.machine import probe
from luthier.plan.planner import Planned, best, device_of, forecast
from luthier.plan.required import make_plan, plan_for

__all__ = ["Planned", "best", "device_of", "forecast", "make_plan", "plan_for", "probe"]
