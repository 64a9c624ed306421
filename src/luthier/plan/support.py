"""What Luthier's own decoder can execute, so that nothing is planned that the engine refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.types import Machine, ModelSpec

FIRST_CLASS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
     "Gemma3ForCausalLM", "Phi3ForCausalLM"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """What there is. ``architectures``: those whose decoder is built; the rest: means that a plan may use."""

    architectures: frozenset[str] = FIRST_CLASS
    weights: frozenset[str] = frozenset({"resident", "quantised", "streamed"})
    offload_checkpoints: bool = True
    embeddings_on_host: bool = True
    optimizer_on_host: bool = True
    share_prefix: bool = False


WHOLE = Engine()  # all that the design has
BUILT = Engine(architectures=frozenset())  # what model/ has today; a decoder that lands enters its architectures here


def not_decoder(config: Any, spec: ModelSpec, engine: Engine) -> str | None:
    """Why this config runs on the generic path; None when the decoder takes it."""
    if spec.architecture not in engine.architectures:
        return f"{spec.architecture} runs through transformers"
    adapter, quantization = config.adapter, config.quantization
    if adapter is not None:
        if adapter.type != "lora":
            return f"the adapter {adapter.type} runs through PEFT"
        for name, plain in (("use_dora", False), ("bias_type", "none"), ("modules_to_save", None)):
            if getattr(adapter, name, plain) not in (plain, ()):
                return f"adapter.{name} runs through PEFT"
    if quantization is not None and (quantization.bits != 4 or quantization.bnb_4bit_quant_type != "nf4"):
        return "a base in other than 4-bit nf4 runs through bitsandbytes"
    if getattr(config.model_parameters, "rope_scaling", None) is not None:
        return "model_parameters.rope_scaling runs through transformers"
    return None


def flash(machine: Machine, device: str, compute: int) -> str | None:
    """Why there is no flash attention; None when there is."""
    if not device.startswith("cuda"):
        return "flash attention needs a CUDA GPU"
    gpu = machine.gpus[int(device.partition(":")[2] or 0)]
    if (gpu.capability or (0, 0)) < (8, 0):
        return f"flash attention needs compute capability 8.0; {gpu.name} has {_dotted(gpu.capability)}"
    return "flash attention needs 16-bit arithmetic" if compute != 2 else None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "an unknown one" if capability is None else ".".join(map(str, capability))
