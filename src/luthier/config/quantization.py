"""The `quantization:` section: the base model's weights in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

from typing import Annotated, Literal

from luthier.config.section import Float, ReadInt, Section, key


class Quantization(Section):
    """How the frozen base is stored. Training needs an adapter beside it."""

    bits: Annotated[Literal[4, 8], ReadInt] = key(4, "Bits a weight.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "The 4-bit number format.")
    bnb_4bit_use_double_quant: bool = key(True, "Quantise the block scales too; saves 0.4 bits a weight.")
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = key(
        "auto",
        "Type of the arithmetic; auto: bfloat16 where the hardware has it, else float16 or float32.",
        ludwig="float16",
        why="bfloat16 does not overflow",
    )
    llm_int8_threshold: Float = key(6.0, "Activations beyond this are computed in 16 bits (8-bit only).", ge=0)
    llm_int8_has_fp16_weight: bool = key(False, "Keep 16-bit main weights (8-bit only).")
