"""What Luthier's own decoder can execute, so that nothing is planned that the engine refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.plan.trained import beside_layers
from luthier.types import Machine, ModelSpec

FIRST_CLASS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
     "Gemma3ForCausalLM", "Phi3ForCausalLM"}
)  # fmt: skip


# What an adapter's keys may be in the decoder; everything else is PEFT's.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias_type": ("none",),
    "modules_to_save": (None, ()),
    "init_lora_weights": ("default", "gaussian"),
    "pretrained_adapter_weights": (None,),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """What there is. ``architectures``: those whose decoder is built; the rest: means that a plan may use.

    ``refusal``: why the decoder does not take this very model, where loading its config has shown that.
    """

    architectures: frozenset[str] = FIRST_CLASS
    weights: frozenset[str] = frozenset({"resident", "quantised", "streamed"})
    offload_checkpoints: bool = True
    mlp_tile: bool = True
    embeddings_on_host: bool = True
    optimizer_on_host: bool = True
    graphs: bool = True
    share_prefix: bool = True
    refusal: str | None = None


BUILT = Engine()  # what the pipeline opens
ROTARY_BY_LENGTH = ("dynamic", "longrope", "su")  # rotary positions whose frequencies depend on the longest of a batch
SWITCHES = ("mlp_bias", "attention_bias", "use_bidirectional_attention")


def refusal_of(values: Mapping[str, Any]) -> str | None:
    """Why the decoder does not take the model of this config.json, where its architecture alone would let it."""
    for switch in SWITCHES:
        if values.get(switch):
            return f"{switch} is set in the model's config"
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ROTARY_BY_LENGTH:
        return f"rotary positions of the type {kind} depend on the longest sample of a batch"
    return None


def not_decoder(config: Any, spec: ModelSpec, engine: Engine) -> str | None:
    """Why this config runs on the generic path; None when the decoder takes it."""
    if engine.refusal is not None:
        return engine.refusal
    if spec.architecture not in engine.architectures:
        return f"{spec.architecture} runs through transformers"
    adapter, quantization = config.adapter, config.quantization
    if adapter is not None:
        if adapter.type != "lora":
            return f"the adapter {adapter.type} runs through PEFT"
        for name, plain in PLAIN.items():
            if getattr(adapter, name, plain[0]) not in plain:
                return f"adapter.{name} runs through PEFT"
        if beside := beside_layers(adapter):
            return f"an adapter beside {beside} (adapter.target_modules) runs through PEFT"
    if quantization is not None and quantization.bits != 4:
        return f"a base in {quantization.bits} bits runs through bitsandbytes"
    if quantization is not None and quantization.bnb_4bit_compute_dtype != "auto":
        return "quantization.bnb_4bit_compute_dtype runs through bitsandbytes"
    parameters = config.model_parameters
    if parameters.neftune_noise_alpha:
        return "model_parameters.neftune_noise_alpha runs through transformers"
    if parameters.rope_scaling is not None and parameters.rope_scaling.rope_type in ROTARY_BY_LENGTH:
        return f"rope_scaling {parameters.rope_scaling.rope_type} runs through transformers"
    return None


def flash(machine: Machine, device: str, compute: int) -> str | None:
    """Why there is no flash attention; None when there is."""
    if not device.startswith("cuda"):
        return "flash attention needs a CUDA GPU"
    gpu = machine.gpus[int(device.partition(":")[2] or 0)]
    if (gpu.capability or (0, 0)) < (8, 0):
        return f"flash attention needs compute capability 8.0; {gpu.name} has {_dotted(gpu.capability)}"
    return "flash attention needs 16-bit arithmetic" if compute != 2 else None


def no_graphs(plan_attention: str, device: str, full: bool) -> str | None:
    """Why passes cannot be CUDA graphs; None when they can (without recomputed layers)."""
    if not device.startswith("cuda"):
        return "graphs need a CUDA GPU"
    if plan_attention != "flash":
        return "graphs need flash attention"
    return "graphs need frozen embeddings, and all weights are trained" if full else None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "an unknown one" if capability is None else ".".join(map(str, capability))
