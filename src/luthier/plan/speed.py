"""How long a plan takes: a roofline of the passes of a step, part by part, and the rates it is computed with.

A pass is as slow as the slower of two things: the device's work (products, traffic) and the host that starts it.
Rates of a card that nobody measured come from its data sheet; what is predicted with them is a range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.data.share import begun_of
from luthier.plan.cards import GIB, Card, card_of
from luthier.plan.job import Job
from luthier.plan.memory import layer_bytes
from luthier.plan.passes import padded, passes_of
from luthier.plan.precision import Precision
from luthier.plan.shape import quantised_bytes
from luthier.types import Machine, Plan

TYPICAL = 8  # steps that stand for all of them while plans are compared
# Kernels that one layer starts in a pass, forward and backward, those of one low-rank pair, and the seconds of host
# work that each costs: of the decoder measured beside an H200 (r 8 on q, v: at most 96 ms a pass of 32 layers; r 16 on
# all linear layers: 159 ms), of the rest assumed.
KERNELS, PAIR_KERNELS = {"decoder": 50, "generic": 300}, {"decoder": 10, "generic": 0}
HOST_SECONDS = 41e-6
GAP = 1.2e-6  # between two kernels on the device: 4.7 ms a pass of 32 layers with r 16 on all linear ones, measured
SHARING = 12  # more of them where keys of a shared beginning are gathered, and their gradients summed
CPU_SECONDS = 12e-6
GRAPHED = 2  # with graphs the host starts the last layer and the loss alone, about as much as this many layers
TRAFFIC = {"decoder": 1.0, "generic": 2.5}  # element-wise reads and writes, against a fused layer
ADAPTER = 5.0  # times that LoRA's inputs and outputs go through memory in a pass, over reading them once
# Share of a CPU's matrix ceiling that a training reaches, and its ceilings a core: measured on two cores of an AMD EPYC
# with AVX-512 bf16 at SmolLM2-135M's sizes (516e9 and 187e9 operations a second).
CPU_SHARE, CPU_BF16, CPU_FP32, CPU_BANDWIDTH = 0.6, 258e9, 93e9, 7.5e9
CACHE = 8 * 2**20  # of a core: a pass whose layer does not fit slows down; larger passes gained nothing on that CPU
# Calibrated (a probe of this machine, or a card that was timed in such runs: `as_timed`) -> low and high, as shares of
# the prediction. Of sixteen probed runs on an H100 fifteen took between 0.97 and 1.10 times what was predicted, one
# 0.70 times; all sixteen on an H200 between 0.98 and 1.07. Without the probe they took 0.93 to 2.03 times as long (the
# most small models; 7B without tiles 0.95 to 1.13), streamed layers 1.93.
RANGE = {True: (0.9, 1.25), False: (0.6, 2.2)}
HOST_SHARE = 1 / 3  # of a step, beyond which the host decides: each machine with such a card has another one


@dataclass(frozen=True, slots=True)
class Span:
    """A prediction in seconds with the range that is claimed for it."""

    seconds: float
    low: float
    high: float

    def __mul__(self, times: float) -> Span:
        return Span(self.seconds * times, self.low * times, self.high * times)

    def plus(self, other: Span) -> Span:
        """Both, one after the other."""
        return Span(self.seconds + other.seconds, self.low + other.low, self.high + other.high)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second. ``matmul``: operations; ``bandwidth``, ``link``: bytes; ``launch``: seconds."""

    name: str
    matmul: float
    half: float  # tokens of a pass at which half of it is reached
    bandwidth: float
    link: float
    launch: float
    cache: float = 0.0  # bytes beyond which element-wise work slows down; 0: no such edge
    timed: int = 0  # hidden size of the model that was timed on it; 0: none was
    source: str = ""

    def products(self, tokens: float) -> float:
        """Operations a second in a pass of ``tokens``."""
        return self.matmul * tokens / (tokens + self.half)


def rates_of(machine: Machine, device: str, precision: Precision, measured: tuple[float, float] | None = None) -> Rates:
    """The rates of ``device`` of the machine. ``measured``: a CPU's (bf16, fp32) operations a second, from a probe."""
    if device.startswith("cuda"):
        gpu = machine.gpus[int(device.partition(":")[2] or 0)]
        return _of_card(card_of(gpu), precision)
    if device == "mps":
        return Rates("Apple GPU", 2.5e12, 100, 100e9, 100e9, 1e-5, source="assumed")
    bf16, fp32 = measured or (CPU_BF16 * machine.cores, CPU_FP32 * machine.cores)
    peak = bf16 if precision == "bf16" and machine.cpu_bf16 else fp32
    return Rates(
        machine.cpu or "CPU",
        CPU_SHARE * peak,
        8.0,
        CPU_BANDWIDTH * machine.cores,
        float("inf"),
        CPU_SECONDS,
        cache=CACHE * machine.cores,
        source="probe of this CPU" if measured else "assumed for each core",
    )


def _of_card(card: Card, precision: Precision) -> Rates:
    peak = card.single * 0.8 if precision == "fp32" else card.half16 * card.gemm
    return Rates(
        card.name, peak * 1e12, card.half, card.bandwidth * 0.8e9, card.link * 1e9, card.launch,
        timed=card.timed, source=card.source,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speed:
    """One optimizer step on average: seconds by part, real tokens, passes."""

    parts: Mapping[str, float]
    tokens: float
    passes: float
    largest: int  # tokens of the largest pass that was met

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.parts.values())


def as_timed(job: Job, plan: Plan, rates: Rates, found: Speed) -> bool:
    """Whether the card was timed in runs like this one: adapters on the decoder, weights and their layers on the GPU.

    Of narrower models than the one that was timed, products reach less of a card's rate.
    """
    plain = plan.model == "decoder" and plan.weights != "streamed" and not plan.mlp_tile and not job.trained.full
    wide = 0 < rates.timed <= job.shape.spec.hidden
    return plain and wide and found.parts.get("launches", 0.0) <= HOST_SHARE * found.seconds


def speed(job: Job, plan: Plan, rates: Rates, *, typical: bool = False) -> Speed:
    """The average step; ``typical`` looks at a few steps alone, which is enough to compare plans."""
    steps: Sequence[tuple[int, ...]] = job.steps or ((job.longest,) * min(job.batch, max(job.rows, 1)),)
    if typical and len(steps) > TYPICAL:
        steps = steps[:: -(-len(steps) // TYPICAL)]
    parts: dict[str, float] = {}
    tokens = passes = largest = 0
    for lengths in steps:
        for rows in passes_of(lengths, plan.tokens_per_pass, plan.model, job.shared * plan.share_prefix):
            computed = job.computed(rows, plan.model, plan.share_prefix)
            largest = max(largest, job.held(rows, plan.model, plan.share_prefix))
            if plan.model == "decoder" and not plan.share_prefix:
                computed = padded(computed, plan.pad_to_multiple_of, plan.graphs)
            passes += 1
            for name, seconds in pass_seconds(job, plan, rates, computed, rows).items():
                parts[name] = parts.get(name, 0.0) + seconds
        tokens += sum(lengths)
    parts = {name: seconds / len(steps) for name, seconds in parts.items()}
    parts["optimizer"] = _update(job, plan, rates)
    return Speed(parts, tokens / len(steps), passes / len(steps), largest)


def pass_seconds(job: Job, plan: Plan, rates: Rates, tokens: int, rows: Sequence[int]) -> dict[str, float]:
    """Seconds of one pass by part. ``tokens``: those computed, padding included; ``rows``: the lengths of its rows."""
    shape, spec, c = job.shape, job.shape.spec, job.compute
    rate, tiled = rates.products(tokens), _tiled(job, plan, tokens)
    slower = tiled * (rate / rates.products(min(plan.mlp_tile or tokens, tokens)) - 1)  # small tiles, small products
    forward = 2.0 * shape.linear * tokens
    again = plan.recompute_layers / max(spec.layers, 1)
    shared = begun_of(job.beginnings, len(rows)) if plan.share_prefix else 0.0
    squared = begun_of(job.beginnings, len(rows), 2) if plan.share_prefix else 0.0
    supervised = (sum(rows) if shared else tokens) * job.share
    training = 3 if job.trained.full else 2  # gradients of activations, and of weights where they are trained
    kept = supervised if plan.model == "decoder" else min(tokens, 1.3 * supervised)
    head = rates.products(min(tokens, plan.loss_chunk)) if plan.model == "decoder" else rate
    padded = plan.model == "generic" or plan.attention == "padded"
    square = len(rows) * max(rows) * max(max(rows) - shared, 0.0) if padded else _squares(rows, squared)
    gathered = len(rows) * shared * 2 * shape.kv * c * 5  # read and written, and their gradients
    out = {
        "products": training * (1 + slower) * forward / rate,
        "recompute": (again * (1 + slower) + tiled + slower) * forward / rate,
        "head and loss": training * 2.0 * shape.embedding * kept / head + kept * spec.vocab * 16 / rates.bandwidth,
        "attention": (3.5 + again) * 2.0 * square * shape.q * spec.layers / (0.4 * rates.matmul)
        + gathered * spec.layers / rates.bandwidth,
        "traffic": _traffic(job, plan, rates, tokens) * (3 + again),
        "adapter": _adapter(job, rates, tokens) * (1 + again / 3),
        "de-quantise": _dequantise(job, plan, rates) * (2 + again),
    }
    if plan.weights == "streamed":
        moved = (2 + again) * quantised_bytes(job.bits, job.double, c) * shape.linear / rates.link
        out["weights from the host"] = max(0.0, moved - out["products"] - out["recompute"])
    if plan.offload_checkpoints:
        moved = 2 * tokens * plan.recompute_layers * spec.hidden * c / rates.link
        out["inputs to the host"] = max(0.0, moved - 0.5 * out["products"])
    return _with_launches(out, job, plan, rates, again)


def _with_launches(out: dict[str, float], job: Job, plan: Plan, rates: Rates, again: float) -> dict[str, float]:
    layers = GRAPHED if plan.graphs else job.shape.spec.layers
    each = KERNELS[plan.model] + PAIR_KERNELS[plan.model] * job.trained.pairs + SHARING * plan.share_prefix
    kernels = each * layers * (1 + again / 3)
    if plan.device == "cpu":  # one worker: what it takes to start the work comes on top
        return out | {"launches": kernels * rates.launch}
    gaps = GAP * kernels / layers * job.shape.spec.layers
    busy = sum(out.values()) + gaps
    host = kernels * max(HOST_SECONDS, rates.launch)
    return out | {"launches": gaps + max(0.0, host - busy)}


def _tiled(job: Job, plan: Plan, tokens: int) -> float:
    """The share of a forward pass that is done once more where feed-forward layers go tile by tile."""
    if not 0 < plan.mlp_tile < tokens:
        return 0.0
    return 3 * job.shape.spec.hidden * job.shape.spec.intermediate * job.shape.spec.layers / job.shape.linear


def _squares(rows: Sequence[int], shared: float) -> float:
    """Scores of a head. ``shared``: those of a row inside its beginning, which are made once."""
    return max(sum(length * length for length in rows) - len(rows) * shared, 0.0) / 2  # causal kernels skip the rest


def _traffic(job: Job, plan: Plan, rates: Rates, tokens: int) -> float:
    """Element-wise work of all layers, once: norms, rotation, SwiGLU, residuals. Slower where it leaves the cache."""
    spec, shape = job.shape.spec, job.shape
    one = job.compute * (10 * spec.hidden + 2 * shape.q + 3 * spec.intermediate)
    spill = 1.0
    if rates.cache:
        spill += tokens * job.compute * (4 * spec.intermediate + 4 * spec.hidden) / rates.cache
        weights = 2 * quantised_bytes(None, False, job.compute) * shape.linear / 3  # read in both directions
        return TRAFFIC[plan.model] * tokens * spec.layers * one * spill / rates.bandwidth + weights / rates.bandwidth
    return TRAFFIC[plan.model] * tokens * spec.layers * one / rates.bandwidth


def _adapter(job: Job, rates: Rates, tokens: int) -> float:
    """LoRA: thin products, bound by reading their inputs and writing their outputs."""
    return ADAPTER * tokens * job.trained.span * job.compute * job.shape.spec.layers / rates.bandwidth


def _dequantise(job: Job, plan: Plan, rates: Rates) -> float:
    """Reading 4-bit weights and writing them in the arithmetic, all layers once."""
    if job.bits is None or plan.weights == "resident":
        return 0.0
    return (quantised_bytes(job.bits, job.double, job.compute) + job.compute) * job.shape.linear / rates.bandwidth


def _update(job: Job, plan: Plan, rates: Rates) -> float:
    moved = (12 + 2 * job.state) * job.trained.weights  # weight, gradient and state, read and written
    if job.paged:
        return moved / min(rates.link, 10e9)
    there_and_back = 2 * job.state * job.trained.weights / rates.link if plan.optimizer == "host" else 0.0
    return moved / rates.bandwidth + there_and_back


__all__ = ["GIB", "RANGE", "Rates", "Span", "Speed", "as_timed", "layer_bytes", "pass_seconds", "rates_of", "speed"]
