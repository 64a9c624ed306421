"""How probable a model finds each of a few given answers: what category outputs predict with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def score_choices(
    model: Any,
    prompt_ids: Sequence[int],
    choices_ids: Sequence[Sequence[int]],
    *,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Probabilities of the choices after a prompt, normalised to sum to 1.

    Each choice should end with its end-of-sequence id: otherwise one that begins another is always favoured.

    Args:
        model: a transformers or PEFT causal language model; its training mode is put back afterwards.
        prompt_ids: the prompt, at least one id.
        choices_ids: the answers to weigh, each at least one id.
        context: entered around the forward pass (autocast, a disabled adapter).

    Returns:
        One probability a choice: the softmax over the choices' summed log-probabilities.
    """
    if not prompt_ids or not choices_ids or not all(choices_ids):
        raise ValueError("score_choices needs a prompt and choices of at least one token each")
    device = model.get_input_embeddings().weight.device
    rows = [[*prompt_ids, *choice] for choice in choices_ids]
    width = max(map(len, rows))
    ids_rt = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask_rt = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), context():
            logits_rtv = model(input_ids=ids_rt, attention_mask=mask_rt, use_cache=False).logits
    finally:
        for module in training:
            module.training = True
    start = len(prompt_ids)
    logprobs_rtv = logits_rtv[:, start - 1 : -1].float().log_softmax(dim=-1)
    target_rt = ids_rt[:, start:]
    taken_rt = logprobs_rtv.gather(2, target_rt[..., None])[..., 0] * mask_rt[:, start:]
    return [float(p) for p in taken_rt.double().sum(dim=1).softmax(dim=0).tolist()]
