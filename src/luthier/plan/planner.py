"""The fastest plan that fits: a pure function of config, model, data and machine, with a reason for each choice.

Every combination of the means that the engine has is a candidate: weights resident, quantised or streamed; recomputing
as few layers as fit; checkpoints, embeddings and optimizer on the device or the host; passes from the whole step down
to one row. Those that fit in free memory less a reserve are compared by predicted time, to which each means adds a
little for what a prediction does not see (`BURDEN`): the simpler plan wins a near tie. More memory can never raise
that cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import le
from typing import Any, Literal

from luthier.config.execution import size_bytes
from luthier.plan import pins, reasons
from luthier.plan.job import Job
from luthier.plan.memory import GIB, MIB, Memory, memory
from luthier.plan.passes import EAGER, GRAPHED, ON_CPU, ROUND, padding_of, rounded
from luthier.plan.speed import Rates, Speed, rates_of, speed
from luthier.plan.support import BUILT, Engine, flash, no_graphs, not_decoder
from luthier.types import DataStats, Machine, ModelSpec, Plan

MAX_TOKENS = 32768  # more in one pass gains nothing on any card
CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)  # passes of a step that are tried
LOSS = {"cuda": (256 * MIB, 32 * MIB), "mps": (128 * MIB,), "cpu": (48 * MIB,)}  # bytes of a chunk of logits
TILE = 1024  # tokens of a feed-forward layer at a time: enough for full speed, and little memory
# What a further padded length of a pass costs once, measured on an H200: its graphs for 32 layers, or what the products
# of a new shape take over those of a known one.
GRAPH_SECONDS, SHAPE_SECONDS = 0.11, 0.015
# What a means must save to be worth it, as a share of the step's time.
BURDEN = {"streamed": 1.0, "offload_checkpoints": 0.03, "mlp_tile": 0.02, "optimizer": 0.03, "embeddings": 0.01,
          "beginnings": 0.03}  # fmt: skip
RESERVE = {"cuda": (0.04, 400 * MIB), "mps": (0.15, GIB), "cpu": (0.10, 512 * MIB)}  # share of free memory, at least


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a run may take of the device and of the host. ``kept``: the reserve of the device."""

    device: int
    host: int
    kept: int = 0

    def holds(self, need: Memory, device: str) -> bool:
        """Whether a plan fits."""
        return not self.lacks(need, device)

    def lacks(self, need: Memory, device: str) -> int:
        """Bytes that a plan needs beyond what there is, of the device and of the host together; 0 where it fits."""
        return max(0, need.host_total - self.host) + (0 if device == "cpu" else max(0, need.total - self.device))


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with what is predicted of it.

    ``speed`` is the average step; ``fits`` is False only for `leanest`; ``probed`` says what was run to know the speed.
    """

    plan: Plan
    job: Job
    memory: Memory
    speed: Speed
    rates: Rates
    room: Room
    fits: bool = True
    probed: str = ""


def device_of(machine: Machine, wanted: str = "auto") -> str:
    """The device a run uses: the GPU with the most free memory, else the CPU; ``wanted`` as `execution.device`."""
    if wanted == "cpu" or not machine.gpus:
        return "cpu"
    best = max(range(len(machine.gpus)), key=lambda index: machine.gpus[index].free)
    return "mps" if machine.gpus[best].kind == "mps" else f"cuda:{best}"


def room_of(config: Any, machine: Machine, device: str) -> Room:
    """Free memory less the reserve, or the declared limit where that is less than what is free."""
    kind = device.split(":")[0]
    free = machine.gpus[int(device.partition(":")[2] or 0)].free if kind != "cpu" else machine.free_memory
    share, least = RESERVE[kind]
    limit, host_limit = config.execution.memory_limit, config.execution.host_memory_limit
    own = min(free, size_bytes(limit)) if limit else max(0, round(free - max(share * free, least)))
    share, least = RESERVE["cpu"]
    spare = max(0, round(machine.free_memory - max(share * machine.free_memory, least)))
    host = min(machine.free_memory, size_bytes(host_limit)) if host_limit else spare
    return Room(own, min(own, host) if kind == "cpu" else host, 0 if limit else free - own)


def best(
    config: Any,
    spec: ModelSpec,
    stats: DataStats,
    machine: Machine,
    *,
    engine: Engine = BUILT,
    measured: tuple[float, float] | None = None,
) -> Planned:
    """The fastest plan that fits, with its forecast; when none does, the plan that needs least, with ``fits`` False.

    ``measured``: rates of this CPU, which change times alone. Raises ConfigError config-conflict for pins that cannot
    work.
    """
    job = Job.of(config, spec, stats, machine)
    device = device_of(machine, config.execution.device)
    start = _start(config, spec, job, machine, device, engine)
    room = room_of(config, machine, device)
    assumed = rates_of(machine, device, job.precision)  # so that a probe changes what is told, never the plan
    fitting, leanest = None, None
    least = pins.declared_recompute(config, job.shape.spec.layers) or 0
    enough: dict[tuple[int, bool, bool, int], list[tuple[int, ...]]] = {}  # the means of plans that fit as they are
    for plan, tokens in _candidates(config, job, start, engine, assumed):
        alike = (plan.tokens_per_pass, plan.share_prefix, plan.graphs, plan.loss_chunk)
        means, known = _means(plan), enough.setdefault(alike, [])
        if any(all(map(le, few, means)) for few in known):
            continue  # further means would only take time
        plan = _with_recompute(config, job, plan, tokens, room)
        need = memory(job, plan, tokens)
        if room.holds(need, device):
            price = cost(job, plan, assumed)
            if fitting is None or price < fitting[0]:
                fitting = (price, plan)
            if plan.recompute_layers <= least:
                known.append(means)
        elif fitting is None:
            over = (room.lacks(need, device), need.total)
            if leanest is None or over < leanest[0]:
                leanest = (over, plan)
    chosen = (fitting or leanest or (0, start))[1]
    rates = rates_of(machine, device, job.precision, measured)
    took = speed(job, chosen, rates)
    need = memory(job, chosen, max(took.largest, 1))
    fits = fitting is not None
    bound = _bound(job, chosen, room)
    told = replace(chosen, reasons=reasons.why(config, job, chosen, machine, engine, spec, fits=fits, bound=bound))
    return Planned(told, job, need, took, rates, room, fits)


def _bound(job: Job, plan: Plan, room: Room) -> reasons.Bound:
    """What keeps the passes of the chosen plan from being larger, with all else as it is."""
    sizes = [size for size in _cuts(job, plan.model, plan.share_prefix) if size > plan.tokens_per_pass]
    if not sizes:
        return "gain"
    tokens = min(sizes)
    need = memory(job, replace(plan, tokens_per_pass=tokens), min(tokens, job.most(plan.model, plan.share_prefix)))
    return "time" if room.holds(need, plan.device) else "memory"


def _means(plan: Plan) -> tuple[int, ...]:
    """How much the plan uses of each means that makes room and takes time, but recomputing."""
    return (
        plan.optimizer == "host",
        plan.embeddings == "host",
        ("resident", "quantised", "streamed").index(plan.weights),
        plan.offload_checkpoints,
        plan.mlp_tile > 0,
    )


def cost(job: Job, plan: Plan, rates: Rates) -> float:
    """What plans are compared by: a step's seconds, with the burden of the means that the plan uses."""
    seconds = speed(job, plan, rates, typical=True).seconds + new_lengths(job, plan)
    burden = BURDEN["streamed"] * (plan.weights == "streamed")
    burden += BURDEN["offload_checkpoints"] * plan.offload_checkpoints + BURDEN["mlp_tile"] * bool(plan.mlp_tile)
    burden += BURDEN["beginnings"] * (plan.share_prefix and not job.shared)  # how many meet in a pass is chance
    burden += BURDEN["optimizer"] * (plan.optimizer == "host") + BURDEN["embeddings"] * (plan.embeddings == "host")
    return seconds * (1 + burden)


def new_lengths(job: Job, plan: Plan) -> float:
    """Seconds that each padded length of a pass costs once on a GPU, as a share of each step of the run."""
    if plan.model != "decoder" or plan.share_prefix or not plan.device.startswith("cuda"):
        return 0.0
    lengths = padding_of(job.steps, plan.tokens_per_pass, plan.pad_to_multiple_of, plan.graphs)[1]
    each = GRAPH_SECONDS * job.shape.spec.layers / 32 if plan.graphs else SHAPE_SECONDS
    return lengths * each / job.total_steps


def _multiples(job: Job, plan: Plan, rates: Rates) -> Sequence[int]:
    """What passes may be padded to a multiple of, best first: as fine a one as the length of the run pays for."""
    if not plan.device.startswith("cuda"):
        return ON_CPU
    one = (6 if job.trained.full else 4) * job.shape.linear / rates.matmul  # seconds of a token's products

    def price(multiple: int) -> float:
        padding = padding_of(job.steps, plan.tokens_per_pass, multiple, plan.graphs)[0]
        return padding * one + new_lengths(job, replace(plan, pad_to_multiple_of=multiple))

    return sorted(GRAPHED if plan.graphs else EAGER, key=price)


def forecast(config: Any, spec: ModelSpec, stats: DataStats, machine: Machine, plan: Plan) -> Planned:
    """What a plan that is given (recorded, or pinned whole) takes on this machine."""
    job = Job.of(config, spec, stats, machine)
    rates, room = rates_of(machine, plan.device, job.precision), room_of(config, machine, plan.device)
    took = speed(job, plan, rates)
    need = memory(job, plan, max(took.largest, 1))
    return Planned(plan, job, need, took, rates, room, room.holds(need, plan.device))


def _start(config: Any, spec: ModelSpec, job: Job, machine: Machine, device: str, engine: Engine) -> Plan:
    """What is decided without comparing: path, attention; pins are checked here."""
    why_not = not_decoder(config, spec, engine)
    model: Literal["decoder", "generic"] = "generic" if why_not or config.execution.model == "generic" else "decoder"
    no_flash = flash(machine, device, job.compute)
    pins.check(config, job, machine, device, model, why_not, no_flash, engine)
    packs = model == "decoder" and no_flash is None and config.execution.attention != "padded"
    return Plan(
        device=device,
        tokens_per_pass=job.longest,
        model=model,
        attention="flash" if packs else "padded",
        weights="quantised" if model == "generic" and job.bits else "resident",
    )


def _candidates(config: Any, job: Job, start: Plan, engine: Engine, rates: Rates) -> Iterator[tuple[Plan, int]]:
    """Every plan to compare, without its recomputed layers, and the tokens of its largest pass; simple ones first."""
    pinned = config.execution
    kind = start.device.split(":")[0]
    decoder, cuda = start.model == "decoder", kind == "cuda"

    def of(name: str, *options: Any) -> Sequence[Any]:
        declared = getattr(pinned, name)
        return options if declared == "auto" else (declared,)

    weights: tuple[str, ...] = (start.weights,)
    if decoder and not job.trained.full:
        every = ("resident", *(("quantised",) if job.bits else ()), *(("streamed",) if cuda else ()))
        weights = tuple(name for name in every if name in engine.weights)
    tables = ("device", "host") if decoder and cuda and job.shape.head and engine.embeddings_on_host else ("device",)
    places = ("device", "host") if decoder and cuda and engine.optimizer_on_host and job.movable else ("device",)
    again = pins.declared_recompute(config, job.shape.spec.layers)
    away = (False, True) if decoder and cuda and engine.offload_checkpoints and again != 0 else (False,)
    tiles = (0, TILE) if decoder and cuda and engine.mlp_tile and not job.trained.full else (0,)
    fast = decoder and engine.graphs and not again
    fast = fast and no_graphs(start.attention, start.device, job.trained.full) is None
    chunks = of("loss_chunk", *_chunks(job, kind)) if decoder else (4096,)
    shares = of("share_prefix", *((True, False) if decoder and engine.share_prefix and shareable(job) else (False,)))
    most = {share: job.most(start.model, share) for share in (False, *shares)}
    multiples: dict[tuple[int, bool], int] = {}
    for cut, share, graphs, chunk, place, table, kept, moved, tile in product(
        of("tokens_per_pass", *_cuts(job, start.model, any(shares))),
        shares,
        of("graphs", *((False, True) if fast else (False,))),
        chunks,
        of("optimizer", *places),
        of("embeddings", *tables),
        of("weights", *weights),
        of("offload_checkpoints", *away),
        of("mlp_tile", *tiles),
    ):
        if graphs and (moved or share or tile):
            continue  # graphs recompute nothing, so there is nothing to move; and their keys are the tokens in order
        tokens = max(cut, job.longest)
        if tile >= tokens and pinned.mlp_tile == "auto":
            continue  # nothing would be cut
        if graphs:  # the largest is made first, so it should be one that comes
            tokens = min(tokens, max(rounded(most[False]), job.longest))
        if (tokens, graphs) not in multiples:
            tried = replace(start, tokens_per_pass=tokens, graphs=graphs)
            multiples[tokens, graphs] = of("pad_to_multiple_of", *_multiples(job, tried, rates))[0]
        found = replace(
            start,
            graphs=graphs,
            pad_to_multiple_of=multiples[tokens, graphs],
            share_prefix=share,
            tokens_per_pass=tokens,
            loss_chunk=chunk,
            optimizer=place,
            embeddings=table,
            weights=kept,
            offload_checkpoints=moved,
            mlp_tile=tile,
        )
        yield found, max(min(tokens, most[share]), job.longest)


def shareable(job: Job) -> bool:
    """Whether rows have a beginnings that can be computed once: with dropout each would have drawn its own."""
    return bool(job.beginnings) and job.dropout == 0


def _chunks(job: Job, kind: str) -> list[int]:
    softmax = 0 if kind == "cpu" and not job.trained.full else 8  # made of a few rows at a time there
    one = job.shape.spec.vocab * (job.compute + softmax)
    return [max(ROUND, size // one // ROUND * ROUND) for size in LOSS[kind]]


def _cuts(job: Job, model: str, share: bool) -> list[int]:
    """Tokens of a pass to try: the largest step in one pass, in two, …, down to the longest row."""
    whole = {job.most(model), job.most(model, share)}
    sizes = [max(-(-most // cut), job.longest) for cut in CUTS for most in whole]
    return sorted({min(rounded(size), max(MAX_TOKENS, job.longest)) for size in sizes}, reverse=True)


def _with_recompute(config: Any, job: Job, plan: Plan, tokens: int, room: Room) -> Plan:
    """The plan with as few recomputed layers as make it fit; with all of them when none is enough."""
    layers = job.shape.spec.layers
    declared = 0 if plan.graphs else pins.declared_recompute(config, layers)
    if declared is not None:
        return replace(plan, recompute_layers=declared)

    def fits(count: int) -> bool:
        return room.holds(memory(job, replace(plan, recompute_layers=count), tokens), plan.device)

    if not plan.offload_checkpoints and fits(0):
        return plan
    if plan.model == "generic" or not fits(layers):
        return replace(plan, recompute_layers=layers)
    low, high = 1, layers  # memory falls with each further layer, from the second on
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return replace(plan, recompute_layers=low)
