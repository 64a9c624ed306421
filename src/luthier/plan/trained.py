"""What a config trains, counted as PEFT makes it: the modules that are meant, and the weights of each adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from luthier.plan.shape import ATTENTION, Shape
from luthier.types import ModelSpec

HEAD, TABLE = "lm_head", "model.embed_tokens"
CONTAINER = "model.layers.0.mlp"  # no adapter can stand there
# Matrices that the files of an architecture hold as one, which then has one adapter.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSING = ("Phi3ForCausalLM",)
NORMED = ({"q_proj", "k_proj", "v_proj", "qkv_proj"}, {"gate_proj", "up_proj", "gate_up_proj"})  # they follow a norm
BIASED = {"Qwen2ForCausalLM": ("q_proj", "k_proj", "v_proj")}
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICHED = (*LAYER_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS = {"Gemma2ForCausalLM": SANDWICHED, "Gemma3ForCausalLM": SANDWICHED}  # of a layer, over its whole width
# Where PEFT puts adapters whose places are part of the method.
TUNED_NORMS = {
    "Qwen2ForCausalLM": ("post_attention_layernorm",),
    "Qwen3ForCausalLM": ("post_attention_layernorm",),
}
SCALED, OTHERS_SCALED = ("k_proj", "v_proj", "down_proj"), ("q_proj", "v_proj", "down_proj")
SCALED_OF = {"LlamaForCausalLM": SCALED, "MistralForCausalLM": SCALED}
FEED_FORWARD = ("down_proj",)


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained. ``ranks``: LoRA's inner widths of a layer in sum; ``span``: its inputs and outputs in sum."""

    weights: int
    frozen: int = 0  # weights of the adapter that are not trained
    full: bool = False
    ranks: int = 0
    span: int = 0
    mlp: bool = False  # whether a matrix of the MLP is adapted
    pairs: float = 0.0  # low-rank pairs of a layer
    normed: float = 0.0  # norms of a layer that an adapted product follows
    head: bool = False  # whether the output head has an adapter, whose scores stand beside the base's
    scaled: int = 0  # numbers that VeRA's scales of a layer are multiplied with, for each token
    cast: int = 0  # weights of its shared factors that a layer takes a copy of in 16 bits


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model that weights belong to, by its dotted name. Of the table of embeddings (words, width)."""

    path: str
    kind: Literal["matrix", "norm", "table"]
    inputs: int
    outputs: int
    bias: int = 0

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """All of it."""
        return (self.inputs if self.kind == "norm" else self.inputs * self.outputs) + self.bias


def trained(adapter: Any, shape: Shape) -> Trained:
    """What the config's ``adapter`` section trains; all weights where it is None."""
    if adapter is None:
        return Trained(shape.spec.parameters, full=True)
    there = modules(shape)
    chosen = _chosen(adapter, there, shape.spec)
    whole = [one for one in there if one.path.endswith(tuple(getattr(adapter, "modules_to_save", None) or ("\0",)))]
    saved = sum(one.weights for one in whole)
    own = sum(COUNTS[adapter.type](adapter, one) for one in chosen)
    bias = getattr(adapter, "bias_type", "none")
    biased = sum(one.bias for one in (there if bias == "all" else chosen)) if bias != "none" else 0
    layers = max(shape.spec.layers, 1)
    pairs = [one for one in chosen if one.kind == "matrix" and one.path != HEAD]
    low_rank = adapter.type in ("lora", "adalora")
    halved = bool(getattr(adapter, "takes_out", False))  # a frozen half goes through the products too
    return Trained(
        own + saved + biased,
        frozen=own * halved + _shared_factors(adapter, chosen),
        ranks=(1 + halved) * sum(_rank(adapter, one) for one in pairs) // layers if low_rank else 0,
        span=sum(one.inputs + one.outputs for one in pairs) // layers if low_rank else 0,
        mlp=any(".mlp." in one.path for one in pairs),
        pairs=len(pairs) / layers if low_rank else 0.0,
        normed=_normed(pairs) / layers if low_rank else 0.0,
        head=any(one.path == HEAD for one in chosen),
        scaled=sum(adapter.r + one.outputs for one in chosen) // layers if adapter.type == "vera" else 0,
        cast=sum(adapter.r * (one.inputs + one.outputs) for one in chosen) // layers if adapter.type == "vera" else 0,
    )


def beside_layers(adapter: Any) -> str | None:
    """The name of the table or head that ``target_modules`` means beside matrices of layers; None where it is none."""
    targets = getattr(adapter, "target_modules", None)
    if targets is None or targets == "all-linear":
        return None
    if _wide(targets):
        return None
    means = _means if adapter.layers_to_transform is None else _named_whole
    left = (path for path in (HEAD, TABLE) if means(targets, path) and not _means(adapter.exclude_modules, path))
    return next((path.rpartition(".")[2] for path in left), None)


def modules(shape: Shape) -> list[Module]:
    """What a model of this shape is made of, by the names of the first-class architectures."""
    spec = shape.spec
    biased = BIASED.get(spec.architecture, ())
    fused = {part: name for name, parts in FUSED.items() for part in parts} if spec.architecture in FUSING else {}
    widths: dict[str, tuple[int, int, int]] = {}
    for name, (inputs, outputs) in shape.matrices.items():
        joined = fused.get(name, name)
        _, before, bias = widths.get(joined, (inputs, 0, 0))
        widths[joined] = (inputs, before + outputs, bias + outputs * (name in biased))
    attention = {*ATTENTION, "qkv_proj"}
    out = []
    for number in range(spec.layers):
        layer = f"model.layers.{number}"
        for name, (inputs, outputs, bias) in widths.items():
            part = "self_attn" if name in attention else "mlp"
            out.append(Module(f"{layer}.{part}.{name}", "matrix", inputs, outputs, bias))
        norms = NORMS.get(spec.architecture, LAYER_NORMS)
        out += [Module(f"{layer}.{name}", "norm", spec.hidden, spec.hidden) for name in norms]
    out.append(Module("model.norm", "norm", spec.hidden, spec.hidden))
    out.append(Module(TABLE, "table", spec.vocab, spec.hidden))
    return [*out, Module(HEAD, "matrix", spec.hidden, spec.vocab)]


def _chosen(adapter: Any, there: Sequence[Module], spec: ModelSpec) -> list[Module]:
    """The modules that get the adapter; all matrices of the layers where names speak of another architecture's."""
    declared = getattr(adapter, "target_modules", None)
    matrices = [one for one in there if one.kind == "matrix" and one.path != HEAD]
    if declared is None and adapter.type == "ln_tuning":
        named = TUNED_NORMS.get(spec.architecture)
        return [one for one in there if (one.kind == "norm" if named is None else one.name in named)]
    if declared is None and adapter.type == "ia3":
        declared = SCALED_OF.get(spec.architecture, OTHERS_SCALED)
    if declared is None or declared == "all-linear":
        found = matrices
    else:
        found = [one for one in (matrices if _wide(declared) else there) if _means(declared, one.path)] or matrices
        if adapter.type != "ln_tuning":
            found = [one for one in found if one.kind != "norm"]
    numbers = getattr(adapter, "layers_to_transform", None)
    if numbers is not None:
        layers = tuple(f"model.layers.{number}." for number in numbers)
        found = [one for one in found if one.path.startswith(layers) or _named_whole(declared, one.path)]
    excluded = getattr(adapter, "exclude_modules", None)
    return [one for one in found if not _means(excluded, one.path)]


def _means(declared: str | Iterable[str] | None, path: str) -> bool:
    """Whether a pattern matches the whole name, or a name of a list is its last part or parts."""
    if declared is None:
        return False
    if isinstance(declared, str):
        try:
            return re.fullmatch(declared, path) is not None
        except re.error:
            return False
    return any(f".{path}".endswith(f".{name}") for name in declared)


def _wide(declared: Any) -> bool:
    """Whether a pattern means whole parts of layers too: PEFT refuses it, the decoder takes the matrices alone."""
    return isinstance(declared, str) and _means(declared, CONTAINER)


def _named_whole(declared: str | Iterable[str] | None, path: str) -> bool:
    """Whether a list has the whole name: to PEFT numbers of layers do not matter then."""
    return not isinstance(declared, str) and declared is not None and path in declared


def _normed(pairs: Iterable[Module]) -> int:
    """Norms that one of the products follows."""
    return len({(one.path.rpartition(".")[0], n) for one in pairs for n, part in enumerate(NORMED) if one.name in part})


def _rank(adapter: Any, module: Module) -> int:
    if adapter.type == "adalora":
        return int(adapter.init_r)
    pattern = getattr(adapter, "rank_pattern", None) or {}
    return int(next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", module.path)), adapter.r))


def _lora(adapter: Any, module: Module) -> int:
    width = module.outputs
    magnitudes = width if getattr(adapter, "use_dora", False) else 0
    return _rank(adapter, module) * (module.inputs + width) + magnitudes


def _shared_factors(adapter: Any, chosen: Sequence[Module]) -> int:
    """VeRA's two factors, which all its modules share and none trains: as wide as the widest of them."""
    if adapter.type != "vera" or not chosen:
        return 0
    return int(adapter.r) * (max(one.inputs for one in chosen) + max(one.outputs for one in chosen))


def _ia3(adapter: Any, module: Module) -> int:
    declared = FEED_FORWARD if adapter.feedforward_modules is None else adapter.feedforward_modules
    return module.inputs if _means(declared, module.path) else module.outputs


def _lokr(adapter: Any, module: Module) -> int:
    (a, b), (c, d) = (_factors(width, adapter.decompose_factor) for width in (module.outputs, module.inputs))
    r = int(adapter.r)
    left = r * (a + c) if adapter.decompose_both and r < max(a, c) / 2 else a * c
    return left + (r * (b + d) if r < max(b, d) / 2 else b * d)


@cache
def _factors(width: int, wanted: int) -> tuple[int, int]:
    """Two factors of ``width``: ``wanted`` first where it divides, else those nearest to a square, smaller first."""
    if wanted > 0 and width % wanted == 0:
        return wanted, width // wanted
    most = width if wanted == -1 else wanted
    small = max(one for one in range(1, int(width**0.5) + 1) if width % one == 0 and one <= max(most, 1))
    return small, width // small


def _oft(adapter: Any, module: Module) -> int:
    width = module.outputs if module.kind == "table" else module.inputs
    wanted = _divisor(width, adapter.oft_block_size or adapter.r)
    blocks, size = (width // wanted, wanted) if adapter.oft_block_size else (wanted, width // wanted)
    return (1 if adapter.block_share else blocks) * (size * (size - 1) // 2)


@cache
def _divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` that is nearest to ``wanted``, the smaller of two."""
    if wanted >= width:
        return width
    return min((one for one in range(1, width + 1) if width % one == 0), key=lambda one: (abs(one - wanted), one))


def _boft(adapter: Any, module: Module) -> int:
    size = module.inputs // int(adapter.boft_block_num) if adapter.boft_block_num else int(adapter.boft_block_size)
    return int(adapter.boft_n_butterfly_factor) * module.inputs * size + module.outputs


# Weights that each kind of adapter trains for one module.
COUNTS: dict[str, Callable[[Any, Module], int]] = {
    "lora": _lora,
    "adalora": lambda a, one: a.init_r * (one.inputs + one.outputs + 1),
    "ia3": _ia3,
    "vera": lambda a, one: a.r + one.outputs,
    "loha": lambda a, one: 2 * a.r * (one.inputs + one.outputs),
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "ln_tuning": lambda a, one: one.weights,
}
