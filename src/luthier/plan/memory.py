"""How much memory a plan takes, item by item, on the device and on the host. All sizes in bytes.

Names: ``t`` tokens of a pass, ``c`` bytes of a number in the arithmetic, ``h q kv i`` as in `shape`, ``v`` vocabulary.
The items are those that torch's allocator holds at the peak; `CONTEXT` is what CUDA takes beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.plan.job import Job
from luthier.plan.shape import quantised_bytes
from luthier.types import Plan

GIB = 2**30
MIB = 2**20
CONTEXT = GIB // 2  # a CUDA context with its libraries, outside torch's allocator
PROCESS = {"cpu": 700 * MIB, "cuda": 1800 * MIB, "mps": 700 * MIB}  # Python with torch and transformers loaded
PER_TOKEN = 16  # bytes of a tokenised token with its weight on the host

# Saved by transformers' Llama for the backward pass, bytes a token and layer for one unit of (h, i, q, kv). Measured
# with torch.autograd.graph.saved_tensors_hooks: (precision is fp32, what is trained) -> coefficients.
GENERIC = {
    (False, "attention"): (12, 6, 4, 4),
    (False, "linear"): (18, 8, 6, 4),
    (False, "full"): (24, 8, 4, 4),
    (True, "attention"): (12, 12, 8, 8),
    (True, "linear"): (16, 16, 8, 8),
    (True, "full"): (24, 16, 8, 8),
}


@dataclass(frozen=True, slots=True)
class Memory:
    """The peak of a plan. ``device`` and ``host`` hold items by name; on a CPU the host's are the device's too."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    context: int
    peak: int  # of the device through torch: what torch.cuda.max_memory_allocated shows

    @property
    def total(self) -> int:
        """The device's peak with what torch does not count."""
        return self.peak + self.context

    @property
    def host_total(self) -> int:
        """The host's peak."""
        return sum(self.host.values())


def memory(job: Job, plan: Plan, tokens: int) -> Memory:
    """The memory of ``plan`` whose largest pass holds ``tokens`` tokens (padded ones on the generic path)."""
    cuda = plan.device.startswith("cuda")
    count, c = job.trained.weights, job.compute
    supervised = max(1, round(tokens * job.share))
    fixed = {
        "weights": _weights(job, plan),
        "adapter": 0 if job.trained.full else (4 + (c if c == 2 else 0)) * count,  # masters, and copies to compute with
        "gradients": 4 * count,
        "optimizer": 0 if plan.optimizer == "host" or job.paged else round(job.state * count),
        "buffers": _buffers(job, plan),
    }
    passing = {
        "activations": _activations(job, plan, tokens, supervised),
        "workspace": _workspace(job, tokens),
        "loss": _loss(job, plan, tokens, supervised),
    }
    scored = _workspace(job, tokens) + _scores(job, plan, tokens, supervised)
    later = {"evaluation": scored, "generation": _answers(job)}
    peak = sum(fixed.values()) + max(sum(passing.values()), *later.values())
    saved = round(max(4.0, job.state) * count) * (2 if cuda else 1)  # a checkpoint is put together in host memory
    host = {"process": PROCESS[plan.device.split(":")[0]], "data": PER_TOKEN * job.tokens, "saving": saved}
    host |= _host(job, plan, tokens, c)
    if not cuda:
        host["run"] = peak
        host.pop("loading")  # weights are read into the place where they stay
    return Memory(fixed | passing | later, {k: v for k, v in host.items() if v}, CONTEXT if cuda else 0, peak)


def _weights(job: Job, plan: Plan) -> int:
    """Frozen weights as the plan keeps them; trained ones as fp32 masters with the copies that autocast computes in."""
    shape, c = job.shape, job.compute
    tables = shape.head + (shape.embedding if plan.embeddings == "device" or not shape.head else 0)
    if job.trained.full:
        return (4 + (2 if c == 2 else 0)) * (shape.linear + tables)
    if plan.weights == "streamed":
        return round(c * tables)
    stored = quantised_bytes(job.bits if plan.weights == "quantised" else None, job.double, c)
    return round(stored * shape.linear + c * tables)


def _buffers(job: Job, plan: Plan) -> int:
    """What de-quantising and streaming write into, reused by every layer."""
    if plan.weights == "quantised":
        return job.compute * job.shape.largest
    if plan.weights == "streamed":  # one group in use, the next on its way, and where they are de-quantised to
        stored = quantised_bytes(job.bits, job.double, job.compute)
        return round((2 * stored + job.compute) * job.shape.largest)
    return 0


def layer_bytes(job: Job, plan: Plan) -> float:
    """Bytes that one layer saves for its backward pass, for each token."""
    spec, shape, c = job.shape.spec, job.shape, job.compute
    if plan.model == "generic":
        what = "full" if job.trained.full else "linear" if job.trained.mlp else "attention"
        h, i, q, kv = GENERIC[c == 4, what]
        low = 4 * c * job.trained.ranks if job.trained.ranks else 0
        return h * spec.hidden + i * spec.intermediate + q * shape.q + kv * shape.kv + low
    kept = 2 * spec.hidden + 2 * shape.q + 2 * shape.kv + 2 * spec.intermediate + job.trained.ranks
    return c * kept + 4 * spec.heads


def _activations(job: Job, plan: Plan, tokens: int, supervised: int) -> int:
    """Saved by all layers; a recomputed one keeps its input alone, and one of them is whole while it is recomputed."""
    spec, c = job.shape.spec, job.compute
    one = layer_bytes(job, plan)
    again = min(plan.recompute_layers, spec.layers)
    inputs = 0 if plan.offload_checkpoints else again * spec.hidden * c
    total = tokens * ((spec.layers - again) * one + inputs + (one if again else 0))
    if plan.model == "decoder" and again < spec.layers:  # the last layer's MLP sees supervised positions only
        total -= (tokens - supervised) * c * (spec.hidden + 2 * spec.intermediate + job.shape.q)
    return round(total)


def _workspace(job: Job, tokens: int) -> int:
    """Buffers of the layer at work in the backward pass: gradients of the MLP's inner side and of the stream."""
    spec = job.shape.spec
    return round(tokens * job.compute * (4 * spec.intermediate + 4 * spec.hidden))


def _loss(job: Job, plan: Plan, tokens: int, supervised: int) -> int:
    """Logits of a chunk in the arithmetic, their softmax in fp32, their gradient; hidden states of the supervised."""
    spec, c = job.shape.spec, job.compute
    if plan.model == "decoder":
        chunk = min(plan.loss_chunk, supervised)
        return chunk * spec.vocab * (2 * c + 4) + 2 * supervised * spec.hidden * c
    kept = min(tokens, round(1.3 * supervised) + 1)  # a column is kept when any row of the pass needs it
    return spec.vocab * (2 * c * kept + (2 * c + 8) * supervised)


def _scores(job: Job, plan: Plan, tokens: int, supervised: int) -> int:
    spec, c = job.shape.spec, job.compute
    rows = min(plan.loss_chunk, supervised) if plan.model == "decoder" else supervised
    return rows * spec.vocab * (c + 4)


def _answers(job: Job) -> int:
    """The key-value cache of the rows answered at one time: as many as memory leaves room for, and at least these."""
    spec, shape = job.shape.spec, job.shape
    rows = min(job.answers, job.answered)
    return rows * (job.longest + job.answer) * spec.layers * 2 * shape.kv * job.compute


def _host(job: Job, plan: Plan, tokens: int, c: int) -> dict[str, int]:
    shape, spec = job.shape, job.shape.spec
    stored = 4 if spec.dtype == "float32" else 2
    widest = max(shape.embedding, shape.largest)
    out = {"loading": widest * (stored + c)}  # tensors are read one at a time; pages of the file can be dropped
    if plan.embeddings == "host":
        out["embeddings"] = c * shape.embedding
    if plan.weights == "streamed":
        out["streamed weights"] = round(quantised_bytes(job.bits, job.double, c) * shape.linear)
    if plan.optimizer == "host" or job.paged:
        out["optimizer"] = round((4 + job.state) * job.trained.weights)  # with the gradients on their way
    if plan.offload_checkpoints:
        out["checkpointed inputs"] = tokens * plan.recompute_layers * spec.hidden * c
    return out
