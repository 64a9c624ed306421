"""What an architecture is made of, read from its config: the same few parts in other measures.

Every first-class architecture is embedding -> layers (norm, attention, norm, gated feed-forward) -> norm -> head. They
differ in numbers and in a few switches, all of which stand here; `model/decoder` has no other knowledge of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from luthier.assets.spec import read_json
from luthier.kernels.glu import Activation
from luthier.plan.support import ROTARY_BY_LENGTH
from luthier.registry import Registry


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: [half] inverse frequencies, and a factor on cosine and sine (YaRN)."""

    inverse: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Shape:
    """Everything the decoder must know of an architecture. ``rotary`` and ``window`` have one entry a layer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    activation: Activation
    tied: bool
    rotary: tuple[Rotary, ...]
    window: tuple[int | None, ...]  # keys that a query sees, itself included; None: all before it
    attention_scale: float
    norm_offset: float = 0.0  # 1 where the norm multiplies by 1 + weight
    embedding_scale: float = 1.0
    post_norms: bool = False  # norms after attention and feed-forward too (Gemma)
    head_norms: bool = False  # a norm on each head of queries and keys (Qwen3, Gemma 3)
    qkv_bias: bool = False
    fused_weights: bool = False  # the files hold qkv_proj and gate_up_proj as one matrix each (Phi-3)
    attention_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def q_rows(self) -> int:
        """Rows of the query matrix."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key matrix, and of the value matrix."""
        return self.kv_heads * self.head_dim


class Unsupported(Exception):
    """The decoder cannot run this config exactly; the message says what is in the way."""


Reader = Callable[[Any], Mapping[str, Any]]
ARCHITECTURES: Registry[Reader] = Registry("architecture")
COMPLETE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def read_shape(folder: Path, rope_scaling: Any = None) -> Shape:
    """The shape of the model in ``folder``. Raises Unsupported with the reason."""
    plain = _complete(read_json(folder / "config.json")) if rope_scaling is None else None
    if plain is not None:
        return shape_of(plain, rope_scaling)
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(folder), rope_scaling)


NEEDED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "hidden_act", "tie_word_embeddings",
)  # fmt: skip

# What the library's defaults say otherwise than by leaving it out: a window of 4,096, heads of 128.
OF_ITS_OWN = {"MistralForCausalLM": "sliding_window", "Qwen3ForCausalLM": "head_dim"}


def _complete(values: Mapping[str, Any]) -> Any:
    """The config as the file has it, where that says everything; None where a library's defaults must fill it in.

    Importing transformers for its configs takes seconds, which a start with cold caches feels.
    """
    name = (values.get("architectures") or [""])[0]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kinds = {str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None}
    theta = "rope_theta" in values or "rope_theta" in rope
    needed = (*NEEDED, *((OF_ITS_OWN[name],) if name in OF_ITS_OWN else ()))
    if name not in COMPLETE or any(key not in values for key in needed) or not theta:
        return None
    if kinds - {"default"} or "partial_rotary_factor" in values:
        return None
    if name.startswith("Qwen") and "layer_types" not in values:
        if values.get("use_sliding_window"):
            return None  # which layers slide is a rule of the library
        values = {**values, "sliding_window": None}
    return SimpleNamespace(**values)


def shape_of(config: Any, rope_scaling: Any = None) -> Shape:
    """The shape that a transformers config means. Raises Unsupported with the reason.

    ``rope_scaling``: the section ``model_parameters.rope_scaling``, which stretches positions.
    """
    name = (getattr(config, "architectures", None) or ["unknown"])[0]
    if name not in ARCHITECTURES:
        raise Unsupported(f"the architecture {name} has no decoder of its own")
    special = dict(ARCHITECTURES.get(name)(config))
    activation = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}.get(
        getattr(config, "hidden_activation", None) or config.hidden_act
    )
    if activation is None:
        raise Unsupported(f"the activation {config.hidden_act} is not built")
    for switch in ("mlp_bias", "attention_bias"):
        if getattr(config, switch, False):
            raise Unsupported(f"{switch} is set")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = tuple(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None)
    if sliding is not None and (not isinstance(sliding, int) or sliding < 0):
        raise Unsupported(f"a window of {sliding!r}")
    kinds = kinds or ("sliding_attention" if sliding else "full_attention",) * config.num_hidden_layers
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise Unsupported(f"layers of the kind {', '.join(sorted(unknown))}")
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        eps=float(config.rms_norm_eps),
        activation=activation,  # type: ignore[arg-type]
        tied=bool(config.tie_word_embeddings),
        rotary=tuple(_rotary(config, kind, head_dim, rope_scaling) for kind in kinds),
        window=tuple(sliding if kind == "sliding_attention" else None for kind in kinds),
        **{"attention_scale": head_dim**-0.5} | special,
    )


@ARCHITECTURES.register("LlamaForCausalLM", "MistralForCausalLM")
def _llama(config: Any) -> Mapping[str, Any]:
    return {}


@ARCHITECTURES.register("Qwen2ForCausalLM")
def _qwen2(config: Any) -> Mapping[str, Any]:
    return {"qkv_bias": True}


@ARCHITECTURES.register("Qwen3ForCausalLM")
def _qwen3(config: Any) -> Mapping[str, Any]:
    return {"head_norms": True}


@ARCHITECTURES.register("Phi3ForCausalLM")
def _phi3(config: Any) -> Mapping[str, Any]:
    return {"fused_weights": True}


def _gemma(config: Any) -> dict[str, Any]:
    if getattr(config, "use_bidirectional_attention", None):
        raise Unsupported("attention in both directions")
    return {
        "norm_offset": 1.0,
        "embedding_scale": config.hidden_size**0.5,
        "post_norms": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "final_softcap": config.final_logit_softcapping,
    }


@ARCHITECTURES.register("Gemma2ForCausalLM")
def _gemma2(config: Any) -> Mapping[str, Any]:
    return _gemma(config)


@ARCHITECTURES.register("Gemma3ForCausalLM")
def _gemma3(config: Any) -> Mapping[str, Any]:
    return _gemma(config) | {"head_norms": True}


def _rotary(config: Any, kind: str, head_dim: int, stretch: Any) -> Rotary:
    """Inverse frequencies of a layer of this kind, by transformers' own formulas where they are not the plain ones."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = isinstance(found.get(kind), Mapping)
    parameters = dict(found[kind] if nested else found)
    if stretch is not None:
        if nested:
            raise Unsupported("rope_scaling on an architecture with two kinds of rotary positions")
        parameters |= {"rope_type": stretch.rope_type, "factor": float(stretch.factor)}
    rope_type = parameters.get("rope_type", "default")
    if rope_type in ROTARY_BY_LENGTH:
        raise Unsupported(f"rotary positions of the type {rope_type}, which depend on the longest sample of a batch")
    theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    if rope_type == "default":
        dim = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
        inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return Rotary(tuple(inverse.tolist()))
    import copy

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = copy.deepcopy(config)
    plain.rope_parameters = parameters | {"rope_theta": theta}
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](plain, torch.device("cpu"))
    return Rotary(tuple(frequencies.tolist()), float(factor))
