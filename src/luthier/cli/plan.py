"""`luthier plan`: will it fit, how long will it take, what will it cost; before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli import common
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.pipeline.planning import Estimate
    from luthier.pipeline.sweep import Sweep
    from luthier.plan.cards import Card
    from luthier.types import Machine

NAME = "plan"
EXAMPLES = ("luthier plan config.yaml", "luthier plan config.yaml --gpu T4 --budget 30m")
NO_MEMORY = 6  # the exit code of a run that does not fit, as of TrainingError

GpuOption = Annotated[str | None, typer.Option("--gpu", help="Plan for a GPU by name, such as T4, 4090, A100, H200.")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Plan for this much free GPU memory, such as 15GiB.")
]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Plan for this machine's CPU.")]
PriceOption = Annotated[str | None, typer.Option("--price", help="What the machine costs, such as 0.35/h.")]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", help="How many rows, or steps, can be afforded in this time, such as 30m.")
]
ProbeOption = Annotated[
    bool, typer.Option("--probe/--no-probe", help="Time a few layers of the base on this machine: better figures.")
]
SweepOption = Annotated[bool, typer.Option("--sweep", help="Compare all GPUs that are known.")]


def command(
    config: common.ConfigArgument = None,
    config_option: common.ConfigOption = None,
    dataset: common.Dataset = None,
    gpu: GpuOption = None,
    memory: MemoryOption = None,
    cpu: CpuOption = False,
    price: PriceOption = None,
    budget: BudgetOption = None,
    sweep: SweepOption = False,
    probe: ProbeOption = True,
    sets: common.Set = None,
    encoding: common.Encoding = None,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.Json = False,
) -> None:
    """Say what training CONFIG will take: memory, time, price. Plans for this machine or another.

    Loads no weights but those of a few layers, to time them, where the plan is for this machine.
    """
    path = common.one_of(config, config_option, "CONFIG", "--config")
    settings = common.load_config(path, sets)
    from luthier.run import Inputs

    unnamed = dataset is None and settings.dataset is None
    data = Inputs(None) if unnamed else common.dataset_of(settings, dataset, path, encoding)
    from luthier.pipeline import planning
    from luthier.pipeline.budget import affordable
    from luthier.pipeline.sweep import Sweep
    from luthier.plan import estimate

    hourly = None if price is None else estimate.price_of(price)
    seconds = None if budget is None else estimate.seconds_of(budget)
    machine, measured = _machine(settings, gpu, memory, cpu)
    with common.session(as_json) as sink:
        need = planning.need_of(
            settings, data.dataset, encoding=data.encoding, trust_remote_code=trust_remote_code, sink=sink
        )
        swept = Sweep.of(need) if sweep else None
        try:
            found = planning.estimate_of(need, machine, measured=measured)
        except ConfigError as error:  # what cannot work here may work on another card
            if swept is None or all(one.found is None for one in swept.cards):
                raise
            _tell_sweep(swept, error, hourly, sink if as_json else None)
            return
        if probe and not sweep and gpu is None and memory is None:
            found = planning.refined(found, sink)
    if cpu:
        found = _by_option(found)
    bought = None if seconds is None else affordable(found, seconds, measured)
    from huggingface_hub import constants

    from luthier.pipeline.space import space_of

    space = space_of(found, Path("runs"), Path(constants.HF_HUB_CACHE))
    if as_json:
        said, heard = _json(found, hourly, bought, swept) | {"space": space.to_json()}, sink.told()
        common.emit(said | heard | {"notes": [*said["notes"], *heard["notes"]]})
    else:
        from luthier.cli import plan_view

        plan_view.show(found, space, hourly, bought, swept)
    if not found.planned.fits and not sweep:
        raise typer.Exit(NO_MEMORY)


def _by_option(found: Estimate) -> Estimate:
    """The estimate of a plan for the CPU because of --cpu, whatever GPUs there are."""
    plan = found.planned.plan
    told = replace(plan, reasons={**plan.reasons, "device": "asked for with --cpu"})
    return replace(found, planned=replace(found.planned, plan=told))


def _tell_sweep(swept: Sweep, error: ConfigError, hourly: float | None, sink: Any | None) -> None:
    """The other cards, where this machine refuses the config; to a program where it has a ``sink`` that listened."""
    if sink is not None:
        refused = [fault.to_json() for fault in error.faults]
        common.emit({"fits": False, "refused": refused, "sweep": swept.to_json(), **sink.told()})
    else:
        from luthier.cli import plan_view

        plan_view.show_sweep(swept, hourly, [fault.message for fault in error.faults])


def _machine(
    settings: Any, gpu: str | None, memory: str | None, cpu: bool
) -> tuple[Machine, tuple[float, float] | None]:
    """The machine to plan for. Raises ConfigError for a GPU that is not known and for options that contradict."""
    from luthier.pipeline import planning
    from luthier.plan import machine as machines
    from luthier.plan.cards import UNKNOWN, card_named, imagined
    from luthier.plan.measure import cpu_rates

    imagines = gpu is not None or memory is not None
    if cpu and imagines:
        raise ConfigError("config-conflict", "--cpu contradicts --gpu and --memory", where="--cpu",
                          received="--cpu with --gpu or --memory", allowed="one of them", fix="keep one")  # fmt: skip
    if cpu:
        return machines.probe("cpu"), cpu_rates()
    if not imagines:
        return planning.here(settings)
    if settings.execution.device == "cpu":
        raise ConfigError("config-conflict", "`execution.device: cpu` contradicts --gpu and --memory: no GPU is used",
                          where="execution.device", received="cpu", allowed="auto, cuda",
                          fix="leave --gpu and --memory out, or add --set execution.device=auto")  # fmt: skip
    card = None if gpu is None else card_named(gpu)
    return imagined(card or UNKNOWN, None if memory is None else _free(memory, card)), None


def _free(memory: str, card: Card | None) -> int:
    """Bytes of --memory. Raises ConfigError for what is no size, nothing, or more than the ``card`` has."""
    from luthier.config import size_bytes
    from luthier.plan.estimate import gib

    allowed, fix = "a size such as 15GiB", "--memory 15GiB"
    try:
        size, why = size_bytes(memory), ""
    except ValueError as error:
        size, why = 0, str(error)
    if card is not None and size > card.memory:
        why, allowed = f"the {card.name} has less memory", f"up to {gib(card.memory)}"
        fix = "leave --memory out, or name another --gpu"
    elif not size:
        why = why or "nothing can be trained in no memory"
    elif size < 2**20:
        why = f"{size:,} bytes are less than any GPU has; a number without a unit is one of bytes"
        fix = f"--memory {memory.strip()}GiB" if memory.strip().isdigit() else fix
    if why:
        raise ConfigError("config-bad-value", why, where="--memory", received=memory, allowed=allowed, fix=fix)
    return size


def _json(found: Estimate, hourly: float | None, bought: Any, swept: Sweep | None) -> dict[str, Any]:
    from dataclasses import asdict

    out = found.to_json()
    if hourly is not None:
        span = found.times.total
        out["cost"] = {"low": span.low / 3600 * hourly, "high": span.high / 3600 * hourly}
    if bought is not None:
        out["affordable"] = asdict(bought)
    if swept is not None:
        out["sweep"] = swept.to_json()
        out["notes"] += swept.notes
    return out
