"""How much memory a plan takes, item by item, on the device and on the host. All sizes in bytes.

Names: ``t`` tokens of a pass, ``c`` bytes of a number in the arithmetic, ``h q kv i`` as in `shape`, ``v`` vocabulary.
The items are those that torch's allocator holds at the peak; `CONTEXT` is what CUDA takes beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from luthier.plan.job import Job
from luthier.plan.passes import laid_of, padded
from luthier.plan.shape import quantised_bytes
from luthier.plan.slots import LEAST, Sizes, Slots, capacity_of
from luthier.types import Plan

GIB = 2**30
MIB = 2**20
CONTEXT = GIB // 2  # a CUDA context with its libraries, outside torch's allocator
PROCESS = {"cpu": 700 * MIB, "cuda": 1800 * MIB, "mps": 700 * MIB}  # Python with torch and transformers loaded
PER_TOKEN = 16  # bytes of a tokenised token with its weight on the host

UPDATED = 128 * MIB  # weights whose optimizer state is on the device at one time, where it waits on the host
CUBLAS = 64 * MIB  # what cuBLAS works in, for the thread that runs forwards and the one that runs backwards
POOL = 0.15  # of a graph's activations, lost between the blocks of its pool; 12 and 24 % measured with one length

# A CPU's attention in 16 bit keeps its weights for rows of so many tokens where nothing is trained but an adapter
# (kernels/host_training.py), of fewer elsewhere (kernels/attention.py).
LONGEST, SHORT = 512, 256
BLOCK = 16  # rows of logits whose softmax a CPU makes at a time (kernels/host_training.py)
PADDED = 1.2  # entries over tokens where similar rows are padded to one length
UNION = 1.6  # columns that any row of a pass needs, over those that one row needs

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
    moments: Mapping[str, float]  # of a step, beside what is there all the time; the largest makes the peak
    host_total: int  # the host's peak: loading, running and saving do not fall together

    @property
    def total(self) -> int:
        """The device's peak with what torch does not count."""
        return self.peak + self.context


def memory(job: Job, plan: Plan, tokens: int) -> Memory:
    """The memory of ``plan`` whose largest pass holds ``tokens`` tokens (padded ones on the generic path).

    Not all items are there at one time: activations go as gradients come. The peak is the largest moment of a step.
    """
    if plan.mlp_tile >= tokens:  # nothing is cut
        plan = replace(plan, mlp_tile=0)
    cuda = plan.device.startswith("cuda")
    count, c = job.trained.weights, job.compute
    parts = Parts.of(job, plan, tokens)
    fixed = {
        "weights": _weights(job, plan),
        # masters, and copies to compute with
        "adapter": 0 if job.trained.full else (4 + (c if c == 2 else 0)) * (count + job.trained.frozen),
        "optimizer": 0 if plan.optimizer == "host" or job.paged else round(job.state * count),
        "buffers": _buffers(job, plan),
        "graphs": _graphs(job, plan, parts),
    }
    moments = parts.moments(job, plan, 4 * count)
    peak = sum(fixed.values()) + round(max(moments.values()))
    items = {
        "gradients": 4 * count,
        "activations": round(parts.saved),
        "workspace": round(parts.work),
        "loss": round(parts.loss),
        "evaluation": round(moments["evaluation"]),
        "generation": round(moments["generation"]),
    }
    saving = round(max(4.0, job.state) * count) * (2 if cuda else 1)  # a checkpoint is put together in host memory
    host = {"process": PROCESS[plan.device.split(":")[0]], "data": PER_TOKEN * job.tokens} | _away(job, plan, tokens)
    passing = {"saving": saving}
    if cuda:
        passing["loading"] = _loading(job)
    else:  # weights are read into the place where they stay, and a checkpoint is written between steps
        passing["run"] = peak
        passing["saving"] += sum(fixed.values())
    kept = {name: size for name, size in (host | passing).items() if size}
    most = sum(host.values()) + max(passing.values())
    return Memory(fixed | items, kept, CONTEXT if cuda else 0, peak, moments, most)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pass holds, in bytes: saved by all layers, by a whole layer, by the last; buffers; the loss."""

    saved: float
    layer: float
    last: float
    inputs: float  # of the recomputed layers
    work: float
    loss: float
    scores: float  # of an evaluation's loss
    turning: float = 0.0  # what the last layer's attention needs beside all that is saved

    @classmethod
    def of(cls, job: Job, plan: Plan, tokens: int) -> Parts:
        """The parts of a pass of ``tokens`` (padded on the generic path, where only the real ones are supervised)."""
        spec, c = job.shape.spec, job.compute
        real = job.fill if plan.model == "generic" else job.real if plan.share_prefix else 1.0
        supervised = max(1.0, min(job.share, 1.0 / real) * tokens * real)
        again, layers = min(plan.recompute_layers, spec.layers), spec.layers
        one = tokens * layer_bytes(job, plan) + (c * job.trained.cast if c == 2 else 0)
        last = one
        if plan.model == "decoder":  # the last layer's MLP sees supervised positions only
            inside = 0 if plan.mlp_tile else 2 * spec.intermediate
            last -= (tokens - supervised) * c * (spec.hidden + inside + job.shape.q)
        inputs = again * tokens * spec.hidden * c
        whole = max(layers - again - 1, 0) * one + (last if again < layers else 0)
        if plan.share_prefix and plan.attention == "padded":
            whole += tokens * job.longest * c  # the mask, which all layers save
        return cls(
            saved=whole + (0 if plan.offload_checkpoints else inputs),
            layer=one,
            last=last if again < layers else 0,
            inputs=0 if plan.offload_checkpoints else inputs,
            work=_work(job, plan, tokens),
            loss=_loss(job, plan, tokens, supervised),
            scores=_scores(job, plan, supervised),
            turning=_turning(job, plan, tokens, supervised) if again < layers else 0.0,
        )

    def moments(self, job: Job, plan: Plan, gradients: float) -> dict[str, float]:
        """What torch holds at the moments that may be the largest, beside what is there all the time."""
        layers = max(job.shape.spec.layers, 1)
        again = min(plan.recompute_layers, layers)
        head, first = (4.0 * job.shape.head, 4.0 * job.shape.embedding) if job.trained.full else (0.0, 0.0)
        each = (gradients - head - first) / layers
        copied, cast = _copies(job, plan)
        fused = job.fused and plan.device.startswith("cuda")
        buffers = 0.0 if fused else 4.0 * job.trained.weights  # the optimizer's own, in an update
        fetched = job.state * min(UPDATED / 4, job.trained.weights) if plan.optimizer == "host" else 0.0
        out = {
            "loss": self.saved + self.loss + copied + cast,
            "backward of the last layers": self.saved - self.last + self.work + head + each + copied,
            "backward of the first layers": self.layer + self.work + gradients - first - each,
            "update": gradients + buffers + fetched,
            "evaluation": self.work + self.scores,
            "generation": _answers(job),
        }
        if again:
            out["recomputing"] = self.inputs + self.layer + self.work + head + (layers - again + 1) * each
        if self.turning:
            out["attention of the last layers"] = self.saved + self.turning + each
        if again == layers:
            del out["backward of the last layers"]
        return out


def _copies(job: Job, plan: Plan) -> tuple[float, float]:
    """Copies in the arithmetic of weights that are trained in fp32: those of a pass, and the head's in the loss."""
    if not job.trained.full or job.compute == 4:
        return 0.0, 0.0
    if plan.model == "generic":  # autocast keeps them while it saves activations
        return (0.0 if plan.checkpointing else 2.0 * job.shape.linear), 2.0 * job.shape.embedding
    return 2.0 * job.shape.largest, 2.0 * job.shape.embedding


def _weights(job: Job, plan: Plan) -> int:
    """Frozen weights as the plan keeps them; trained ones as fp32 masters with the copies that autocast computes in."""
    shape, c = job.shape, job.compute
    tables = shape.head + (shape.embedding if plan.embeddings == "device" or not shape.head else 0)
    if job.trained.full:
        return 4 * (shape.linear + tables)
    if plan.weights == "streamed":
        return round(c * tables)
    stored = quantised_bytes(job.bits if plan.weights == "quantised" else None, job.double, c)
    return round(stored * shape.linear + c * tables)


def _buffers(job: Job, plan: Plan) -> int:
    """What products, de-quantising and streaming work in, reused by every layer."""
    libraries = CUBLAS if plan.device.startswith("cuda") else 0
    if plan.weights == "quantised":
        return libraries + job.compute * job.shape.largest
    if plan.weights == "streamed":  # one group in use, the next on its way, and where they are de-quantised to
        stored = quantised_bytes(job.bits, job.double, job.compute)
        return libraries + round((2 * stored + job.compute) * job.shape.largest)
    return libraries


def _graphs(job: Job, plan: Plan, parts: Parts) -> int:
    """What graphs hold beside the activations of a pass: what their pool cannot use; input, output, its gradient."""
    if not plan.graphs:
        return 0
    tokens = padded(plan.tokens_per_pass, plan.pad_to_multiple_of, True)
    return CUBLAS + round(POOL * parts.saved + 3 * tokens * job.shape.spec.hidden * job.compute)


def layer_bytes(job: Job, plan: Plan) -> float:
    """Bytes that one layer saves for its backward pass, for each token."""
    spec, shape, c = job.shape.spec, job.shape, job.compute
    if plan.model == "generic":
        what = "full" if job.trained.full else "linear" if job.trained.mlp else "attention"
        h, i, q, kv = GENERIC[c == 4, what]
        low = 4 * c * job.trained.ranks + c * job.trained.scaled
        return h * spec.hidden + i * spec.intermediate + q * shape.q + kv * shape.kv + low
    if hosted(job, plan):
        return _hosted_bytes(job, plan)
    packed, keys = plan.attention == "flash", job.real if plan.share_prefix else 1.0  # each row has its prefix's too
    # where rows are padded, keys and values are repeated for each head
    heads = 2 * shape.q + 2 * shape.kv * keys if packed else (1 + 2 * PADDED * (1 + keys)) * shape.q
    inside = 0 if plan.mlp_tile else 2 * spec.intermediate  # gate and up, which a tile makes again
    kept = 2 * spec.hidden + heads + inside + job.trained.ranks
    return c * kept + 4 * spec.heads + 8 + _weights_of_attention(job, plan)  # and in fp32 a log-sum-exp and two norms


def hosted(job: Job, plan: Plan) -> bool:
    """Whether a CPU trains an adapter of the decoder: kernels/host_training.py then does the work."""
    return plan.device == "cpu" and plan.model == "decoder" and not job.trained.full


def _hosted_bytes(job: Job, plan: Plan) -> float:
    """`layer_bytes` there: what enters a norm that an adapter follows is kept too, and an activation."""
    spec, shape, c = job.shape.spec, job.shape, job.compute
    kept = 2 * spec.hidden + shape.q + job.trained.ranks + spec.hidden * job.trained.normed
    if plan.mlp_tile:  # makes what its adapters need again
        kept -= (job.trained.normed - min(job.trained.normed, 1.0)) * spec.hidden
    else:
        kept += 3 * spec.intermediate  # gate, up and the gate's activation
    if not _laid_out(job, plan):  # torch's kernel wants keys and values for each head
        keys = job.real if plan.share_prefix else 1.0
        kept += 2 * PADDED * (1 + keys) * shape.q - shape.q
        return c * kept + 4 * spec.heads + 8 + _weights_of_attention(job, plan)
    padding, squares, _ = laid_of(job.steps, plan.tokens_per_pass)
    return c * (kept + padding * (shape.q + 2 * shape.kv) + spec.heads * squares) + 8


def _laid_out(job: Job, plan: Plan) -> bool:
    """Whether attention is made of products over rows that are laid out for it, and keeps those and its weights."""
    return hosted(job, plan) and job.compute == 2 and not plan.share_prefix and job.longest <= LONGEST


def _turning(job: Job, plan: Plan, tokens: int, supervised: float) -> float:
    """What the last layer's attention works in, over what its feed-forward layer has let go of by then."""
    if not _laid_out(job, plan):
        return 0.0
    inside = 0 if plan.mlp_tile else 3 * job.shape.spec.intermediate
    gone = job.compute * (inside + job.shape.spec.hidden + job.shape.q)
    return tokens * _attention_work(job, plan) - supervised * gone


def _attention_work(job: Job, plan: Plan) -> float:
    """Buffers of the attention at work in the backward pass, for each token."""
    spec, shape, c = job.shape.spec, job.shape, job.compute
    laid, (_, squares, share) = shape.q + 2 * shape.kv, laid_of(job.steps, plan.tokens_per_pass)
    scored = c * (shape.q + laid + share * (shape.q + laid + 2 * spec.heads * squares) + 2 * spec.hidden)
    turned = c * (shape.q + laid + 2 * spec.hidden) + (8 + c) * (shape.q + shape.kv)
    return max(scored, turned)


def _weights_of_attention(job: Job, plan: Plan) -> float:
    """What the attention of short rows in 16 bit on a CPU keeps for each token: its weights, in fp32 and rounded."""
    if plan.device != "cpu" or job.compute != 2 or job.longest > SHORT:
        return 0.0
    rows = [length for step in job.steps for length in step]
    squares = sum(length * length for length in rows) / max(sum(rows), 1)
    return 6.0 * job.shape.spec.heads * squares


def _work(job: Job, plan: Plan, tokens: int) -> float:
    """Buffers of the layer at work in the backward pass."""
    if not plan.mlp_tile:
        return tokens * _work_bytes(job, plan)
    # a tile's own, with what it saves; of all tokens the gradients on both sides, or those of attention
    tile = plan.mlp_tile * (_work_bytes(job, plan) + 2 * job.compute * job.shape.spec.intermediate)
    wide = 8 if plan.device.startswith("cuda") else 6 if job.compute == 2 else 2
    if _laid_out(job, plan):
        gone = job.compute * (job.shape.spec.hidden + job.shape.q)  # what the products after attention had kept
        return max(
            tile + 4 * tokens * job.compute * job.shape.spec.hidden, tokens * (_attention_work(job, plan) - gone)
        )
    return tile + tokens * job.compute * wide * job.shape.spec.hidden


def _work_bytes(job: Job, plan: Plan) -> float:
    """Buffers of the layer at work in the backward pass, for each token: what its MLP needs at one time.

    Measured as the most that is alive (tests/unit/plan/live.py); the fused kernels of a GPU keep no fp32 between.
    """
    spec, c = job.shape.spec, job.compute
    if plan.model == "generic":
        return 8.0 * spec.intermediate + 8.0 * spec.hidden
    if plan.device.startswith("cuda"):
        return c * (4.0 * spec.intermediate + 4.0 * spec.hidden)
    if hosted(job, plan):
        return c * ((3.0 + job.trained.mlp) * spec.intermediate + 2.0 * spec.hidden)
    return (23.0 if c == 4 else 9.5) * spec.intermediate + 8.0 * spec.hidden


def _loss(job: Job, plan: Plan, tokens: int, supervised: float) -> float:
    """Logits of a chunk with what their softmax needs, and hidden states of the supervised with their gradient."""
    spec, c = job.shape.spec, job.compute
    if plan.model == "decoder":
        chunk = min(plan.loss_chunk, supervised)
        if hosted(job, plan):  # the softmax is made of a few rows at a time
            return (chunk * c + min(chunk, BLOCK) * 8) * spec.vocab + (3 * supervised + 6 * chunk) * spec.hidden * c
        softmax = 0 if plan.device.startswith("cuda") else 12 if c == 2 else 8  # fused kernels overwrite the logits
        return chunk * spec.vocab * (c + softmax) + 3 * supervised * spec.hidden * c
    kept = min(tokens, UNION * supervised / job.fill)
    forward = c * kept + (c + (8 if c == 2 else 4)) * supervised
    head = job.trained.head  # scores of its own beside the base's: they, scaled, and the sum
    return spec.vocab * max(forward, 4 * head * c * kept, c * ((2 + head) * kept + supervised))


def _scores(job: Job, plan: Plan, supervised: float) -> float:
    spec, c = job.shape.spec, job.compute
    rows = min(plan.loss_chunk, supervised) if plan.model == "decoder" else supervised
    return rows * spec.vocab * (c + 8)


def _answers(job: Job) -> int:
    """What the rows answered at one time take: as many as memory leaves room for, and at least these."""
    sizes = Sizes.of(job.shape.spec, job.compute)
    rows = min(job.answers, job.answered)
    return sum(Slots(rows, capacity_of(job.longest + job.answer), LEAST if rows else 0).bytes(sizes).values())


def _loading(job: Job) -> int:
    """Tensors are read one at a time; pages of the file can be dropped."""
    stored = 4 if job.shape.spec.dtype == "float32" else 2
    return max(job.shape.embedding, job.shape.largest) * (stored + job.compute)


def _away(job: Job, plan: Plan, tokens: int) -> dict[str, int]:
    """What the plan keeps on the host for the device."""
    shape, c = job.shape, job.compute
    out: dict[str, int] = {}
    if plan.embeddings == "host":
        out["embeddings"] = c * shape.embedding
    if plan.weights == "streamed":
        out["streamed weights"] = round(quantised_bytes(job.bits, job.double, c) * shape.linear)
    if plan.optimizer == "host" or job.paged:
        out["optimizer"] = round(job.state * job.trained.weights)
    if plan.offload_checkpoints:
        out["checkpointed inputs"] = tokens * plan.recompute_layers * shape.spec.hidden * c
    return out
