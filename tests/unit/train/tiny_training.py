"""A tiny model and examples of unequal length for the tests of training."""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from luthier.types import Batch, Example


def padded_logprobs(model):
    """The generic path in a few lines: rows padded right, one log-probability a supervised target."""

    def score(batch: Batch):
        rows = batch.ids.split(batch.lengths)
        ids = pad_sequence(list(rows), batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        at = batch.target_weight.nonzero().squeeze(1)
        chosen = logits[batch.segment[at], batch.positions[at] - 1]
        logprobs = chosen.log_softmax(-1).gather(1, batch.ids[at, None]).squeeze(1)
        return logprobs, chosen.argmax(-1) == batch.ids[at]

    return score


def make_examples(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for row in range(count):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        out.append(Example(ids=ids, weights=[0.0] * prompt + [1.0] * (length - prompt), row=row))
    return out


def make_model(folder: Path, *, adapter: bool = True, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
