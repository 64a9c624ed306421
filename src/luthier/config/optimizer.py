"""The `trainer.optimizer` and `trainer.gradient_clipping` sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from luthier.config.section import Conflict, Float, Section, key

OptimizerType = Literal[
    "adamw",
    "adam",
    "sgd",
    "adafactor",
    "lion",
    "adamw_8bit",
    "adam_8bit",
    "lion_8bit",
    "paged_adamw",
    "paged_adam",
    "paged_adamw_8bit",
    "paged_adam_8bit",
    "paged_lion_8bit",
]


class Optimizer(Section):
    """How gradients become updates. `params: {...}` is understood as the same keys written one level up."""

    type: OptimizerType = key(
        "adamw",
        "The optimizer; 8bit and paged ones come from bitsandbytes.",
        ludwig="adam",
        why="the field's standard; without weight decay it is adam",
        source="Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv 1711.05101",
    )
    lr: Float | None = key(None, "Learning rate; empty: trainer.learning_rate.", gt=0)
    betas: tuple[Float, Float] | None = key(
        None,
        "Smoothing of the gradient and its square; empty: 0.9 and 0.999, for lion 0.9 and 0.99.",
        source="Kingma and Ba 2015, Adam, arXiv 1412.6980; for lion bitsandbytes' own",
    )
    eps: Float | None = key(
        None,
        "Added to the denominator; empty: 1e-8 (adam kinds).",
        source="Kingma and Ba 2015, Adam, arXiv 1412.6980",
        gt=0,
    )
    weight_decay: Float = key(
        0.0,
        "Decay of the weights each step: adam and sgd add it to the gradient, the others take it off the weights, "
        "bitsandbytes' adam_8bit and paged_adam kinds among them.",
        source="the recipe of Stanford Alpaca, Taori et al. 2023",
        ge=0,
    )
    momentum: Float = key(0.0, "Momentum (sgd).", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov's momentum (sgd).")
    amsgrad: bool = key(False, "The AMSGrad variant (adam, adamw).")

    @model_validator(mode="after")
    def _belongs(self) -> Optimizer:
        kind = self.type
        if self.betas is not None:
            if any(not 0 <= b < 1 for b in self.betas):
                raise Conflict(
                    "betas are two numbers from 0 to under 1",
                    received=str(list(self.betas)),
                    allowed="two numbers from 0 to under 1",
                    fix="betas: [0.9, 0.999]",
                )
            if kind in ("sgd", "adafactor"):
                raise self._meaningless("betas have", "adam, adamw and lion")
        if (self.momentum or self.nesterov) and kind != "sgd":
            raise self._meaningless("momentum and nesterov have", "sgd")
        if self.nesterov and not self.momentum:
            raise Conflict(
                "nesterov needs a momentum over 0",
                received=f"nesterov: true, momentum: {self.momentum:g}",
                allowed="a momentum over 0 and under 1 with nesterov: true",
                fix="momentum: 0.9, or leave nesterov out",
            )
        if self.eps is not None and (kind == "sgd" or "lion" in kind):
            raise self._meaningless("eps has", "adam, adamw and adafactor")
        if self.amsgrad and kind not in ("adam", "adamw"):
            raise self._meaningless("amsgrad has", "adam and adamw")
        return self

    def _meaningless(self, what: str, where: str) -> Conflict:
        name = what.rpartition(" ")[0]
        return Conflict(
            f"{what} no meaning for {self.type}",
            received=f"type: {self.type}",
            allowed=f"{name} with {where}",
            fix=f"leave {name} out, or choose another type",
        )


class GradientClipping(Section):
    """Bounds on the gradient before each update. An empty bound is off."""

    clipglobalnorm: Float | None = key(
        1.0,
        "Largest norm of all gradients together.",
        ludwig=0.5,
        why="keeps one odd batch from undoing what was learned",
        source="clipping by the norm: Pascanu et al. 2013, arXiv 1211.5063; the value: the default of transformers' "
        "TrainingArguments (max_grad_norm)",
        gt=0,
    )
    clipnorm: Float | None = key(None, "Largest norm of each weight's gradient.", gt=0)
    clipvalue: Float | None = key(None, "Largest absolute value of a gradient's element.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _one(cls, data: Any) -> Any:
        """Another bound given alone replaces the global one."""
        if isinstance(data, dict) and "clipglobalnorm" not in data and (data.get("clipnorm") or data.get("clipvalue")):
            return {**data, "clipglobalnorm": None}
        return data
