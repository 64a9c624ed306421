"""What AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) does beside the forward pass: its penalty and its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MOMENTS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names for the importance of each weight and its averages


class AdaLora:
    """The moving parts of one AdaLoRA adapter: made for a PEFT model that trains one, None for any other."""

    def __init__(self, model: Any, name: str) -> None:
        self._tuner = model.base_model
        self._config = self._tuner.peft_config[name]

    @classmethod
    def of(cls, model: Any) -> AdaLora | None:
        """The AdaLoRA of this model, if it has one that is trained.

        PEFT makes no allocator for one that is only asked; weights beside it (biases) may want a gradient all the same.
        """
        adapters = getattr(model, "peft_config", {}).items()
        trained = [name for name, one in adapters if one.peft_type == "ADALORA" and not one.inference_mode]
        return cls(model, trained[0]) if trained else None

    def penalty(self) -> torch.Tensor:
        """How far the factors are from orthogonal: the mean Frobenius norm of AᵀA - I (eq. 4), times its weight."""
        norms = []
        for name, weight in self._tuner.named_parameters():
            if weight.requires_grad and ("lora_A" in name or "lora_B" in name):
                gram = weight @ weight.T if "lora_A" in name else weight.T @ weight
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        mean: torch.Tensor = torch.stack(norms).mean() * self._config.orth_reg_weight
        return mean

    def after_update(self, step: int) -> None:
        """Weigh the ranks by the gradients that are still there, and silence those beyond the budget of this step."""
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        """What `restore` needs: moments of the importance, and which ranks are silent."""
        allocator = self._tuner.rankallocator
        moments = {name: dict(getattr(allocator, name)) for name in MOMENTS}
        return {**moments, "rank_pattern": self._config.rank_pattern}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        where = {name: weight.device for name, weight in self._tuner.model.named_parameters()}
        for name in MOMENTS:
            setattr(self._tuner.rankallocator, name, {k: v.to(where[k]) for k, v in state[name].items()})
        self._config.rank_pattern = state["rank_pattern"]
