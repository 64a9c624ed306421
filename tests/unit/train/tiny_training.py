"""A tiny model and examples of unequal length for the tests of training."""

from pathlib import Path

import torch

from luthier.types import Example


def make_examples(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for row in range(count):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        out.append(Example(ids=ids, weights=[0.0] * prompt + [1.0] * (length - prompt), row=row))
    return out


def make_model(folder: Path, *, adapter: bool = True, dropout: float = 0.0, bits: int | None = None):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = None
    if bits == 4:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantized)
    if not adapter:
        return model
    torch.manual_seed(3)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():  # B starts at 0, where most gradients vanish
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model
