"""What answering takes on a machine: memory item by item, rows at once, seconds of a step. For `luthier plan`.

A step gives every row a token. It reads all weights once, and the keys and values of every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from luthier.plan.cards import card_of
from luthier.plan.job import Job
from luthier.plan.memory import CONTEXT, PROCESS
from luthier.plan.planner import Planned
from luthier.plan.shape import quantised_bytes
from luthier.plan.slots import FEW, LAID_OUT, ROWS, Sizes, Slots, fits_spread, slots_of
from luthier.plan.speed import CPU_SECONDS, RANGE, Rates, Span
from luthier.types import Machine

# Seconds of a layer in a step beside what is read and multiplied. decoder on CUDA: fitted to four settings on one H200
# (benchmarks/results/generation_h200.jsonl); generic: about 70 kernels started one by one.
LAYER_SECONDS = {"decoder": 41e-6, "generic": 1.5e-3}
# Of a layer that reads prompts on CUDA, one kernel at a time. decoder: between 0.3 (beside an H200) and 0.6 (an H100).
READ_SECONDS = {"decoder": 0.45e-3, "generic": 1.5e-3}
CPU_KERNELS = {"decoder": 12, "generic": 60}  # of a layer
MEASURED = {"H200": "benchmarks/results/generation_h200.jsonl"}
CLAIMED = (0.7, 1.45)  # of a prediction on a card that was measured: what those measurements lie within


@dataclass(frozen=True, slots=True)
class Answering:
    """What answering takes on a machine: sizes in bytes, times in seconds."""

    token: int  # of the cache
    tokens: int  # of the longest row, prompt and answer
    slots: Slots
    memory: Mapping[str, int]  # item -> bytes
    room: int
    step: Span  # all slots in use, each half full
    alone: Span  # one row
    first: Span  # until a prompt of the mean length is read
    measured: bool
    source: str

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether one row can be answered at all."""
        return self.total <= self.room

    def to_json(self) -> dict[str, Any]:
        """As JSON types; rates in tokens a second."""
        return {
            "cache_bytes_per_token": self.token,
            "longest": self.tokens,
            "rows": self.slots.rows,
            "capacity": self.slots.capacity,
            "memory": {**self.memory, "total": self.total, "room": self.room},
            "fits": self.fits,
            "tokens_per_second": asdict(rate(self.slots.rows, self.step)),
            "tokens_per_second_alone": asdict(rate(1, self.alone)),
            "first_token": asdict(self.first),
            "measured": self.measured,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second, with the range that is claimed."""

    tokens: float
    low: float
    high: float


def rate(rows: int, step: Span) -> Rate:
    """Tokens a second of steps that give each of ``rows`` one."""
    return Rate(rows / step.seconds, rows / step.high, rows / step.low)


def prediction(planned: Planned, machine: Machine) -> Answering:
    """Answering a table with what was trained, in a process of its own."""
    job, kind = planned.job, planned.plan.device.split(":")[0]
    decoder = planned.plan.model == "decoder"
    shape, number, free = job.shape, job.compute, _free(planned)
    spread = job.bits is None or (decoder and fits_spread(shape.linear, number, free))
    stored = quantised_bytes(None if spread else job.bits, job.double, number)
    weights = round(stored * shape.linear) + number * (shape.embedding + shape.head)
    adapter = (
        0 if job.trained.full else (4 + (number if number == 2 else 0)) * (job.trained.weights + job.trained.frozen)
    )
    beside = {"weights": weights, "adapter": adapter}
    return _answering(planned, machine, beside, weights, ROWS[kind], 0 if spread else number * shape.linear)


def evaluation(planned: Planned, machine: Machine) -> Answering:
    """Answering validation rows between the steps of training, beside all that training keeps."""
    kept = ("weights", "adapter", "optimizer", "buffers")
    beside = {name: planned.memory.device.get(name, 0) for name in kept}
    weights, job = beside["weights"], planned.job
    size = spread = job.shape.linear * job.compute if planned.plan.weights == "quantised" else 0
    room = _free(planned) - sum(beside.values())
    if size and planned.plan.model == "decoder" and fits_spread(job.shape.linear, job.compute, room):
        beside["weights spread out"] = weights = size
        spread = 0
    return _answering(planned, machine, beside, weights, max(job.answers, 1), spread)


def _free(planned: Planned) -> int:
    """What may be taken of the device, less what the process takes before any model."""
    return max(0, planned.room.device - (PROCESS["cpu"] if planned.plan.device == "cpu" else CONTEXT))


def _answering(
    planned: Planned, machine: Machine, beside: Mapping[str, int], weights: int, rows: int, spread: int
) -> Answering:
    """What it takes.

    Args:
        planned: the job and its plan.
        machine: where.
        beside: what is there all the time, by item.
        weights: bytes that a step reads.
        rows: to answer.
        spread: bytes that a step of more than a few rows writes and reads again, where the base stays in 4 bits.
    """
    job, plan, rates, free = planned.job, planned.plan, planned.rates, _free(planned)
    kind, sizes = plan.device.split(":")[0], Sizes.of(planned.job.shape.spec, planned.job.compute)
    taken = {name: size for name, size in beside.items() if size}
    again = job.shape.linear + job.shape.embedding
    lays_out = kind == "cpu" and plan.model == "decoder" and min(job.answer, rows * LAID_OUT) >= LAID_OUT
    if lays_out and fits_spread(again, job.compute, free - sum(taken.values())):
        taken["laid out"] = again * job.compute
    longest = job.longest + job.answer
    longest = min(longest, job.shape.spec.context or longest)
    declared = job.answered if job.answered > 1 else None
    slots = slots_of(sizes, kind, max(0, free - sum(taken.values())), longest, rows, declared)
    card = card_of(machine.gpus[int(plan.device.partition(":")[2] or 0)]).name if kind == "cuda" else ""
    known = MEASURED.get(card) if plan.model == "decoder" else None
    low, high = CLAIMED if known else RANGE[False]

    def span(seconds: float) -> Span:
        return Span(seconds, low * seconds, high * seconds)

    def step(count: int, held: float) -> float:
        again = 0 if count <= FEW and kind == "cuda" and plan.model == "decoder" else 2 * spread
        return step_seconds(job, plan.model, kind, rates, weights + again, count, held)

    prompt = max(1.0, job.tokens / max(job.rows, 1) * (1 - job.share))
    return Answering(
        sizes.token, longest, slots, taken | slots.bytes(sizes), free,
        step=span(step(slots.rows, longest / 2)),
        alone=span(step(1, longest / 2)),
        first=span(first_seconds(job, plan.model, kind, rates, prompt) + step(1, prompt)),
        measured=known is not None,
        source=known or rates.source,
    )  # fmt: skip


def step_seconds(job: Job, model: str, kind: str, rates: Rates, weights: float, rows: int, held: float) -> float:
    """Seconds in which each of ``rows`` gets a token. ``weights``: their bytes; ``held``: tokens of a row."""
    spec = job.shape.spec
    looked_up = 0 if spec.tied_embeddings else job.shape.embedding * job.compute  # of which a row each is read
    read = (weights - looked_up) / rates.bandwidth
    products = 2.0 * (job.shape.linear + job.shape.embedding) * rows / rates.products(rows)
    layer = CPU_SECONDS * CPU_KERNELS[model] if kind == "cpu" else LAYER_SECONDS[model]
    cache = rows * held * Sizes.of(spec, job.compute).token / rates.bandwidth
    return max(read, products) + cache + spec.layers * layer


def first_seconds(job: Job, model: str, kind: str, rates: Rates, tokens: float) -> float:
    """Seconds of reading a prompt of so many tokens."""
    host = 0.0 if kind == "cpu" else job.shape.spec.layers * READ_SECONDS[model]
    return max(2.0 * job.shape.linear * tokens / rates.products(tokens), host)
