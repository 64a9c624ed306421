"""The optimizers by name. Weight decay is kept from biases and norms (one-dimensional weights), as is usual."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import ConfigError, missing_extra
from luthier.registry import Registry

if TYPE_CHECKING:
    from luthier.config.optimizer import Optimizer as Declared

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, float, "Declared", str], torch.optim.Optimizer]
ADAM_BETAS, ADAM_EPS, LION_BETAS = (0.9, 0.999), 1e-8, (0.9, 0.99)
OPTIMIZERS: Registry[Factory] = Registry("optimizer")


def build_optimizer(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    declared: Declared,
    learning_rate: float,
    device: str,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """The declared optimizer over the trainable weights; ``loraplus_lr_ratio`` scales the rate of LoRA's B matrices."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, weight in named:
        if not weight.requires_grad:
            continue
        ratio = loraplus_lr_ratio if loraplus_lr_ratio and "lora_B" in name else 1.0
        decayed = weight.ndim >= 2
        decay = declared.weight_decay if decayed else 0.0
        empty = {"params": [], "weight_decay": decay, "lr": learning_rate * ratio}
        groups.setdefault((decayed, ratio), empty)["params"].append(weight)
    assert groups, "nothing to train"
    return OPTIMIZERS.get(declared.type, where="trainer.optimizer.type")(
        list(groups.values()), learning_rate, declared, device
    )


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first update would make, so that every pass finds the memory as the later ones do.

    A step without gradient, rate and decay moves no weight; what it has counted is set back.
    """
    groups, rates = optimizer.param_groups, ("lr", "weight_decay")
    weights = [weight for group in groups for weight in group["params"]]
    declared = [{name: group[name] for name in rates} for group in groups]
    try:
        for group in groups:
            group.update(dict.fromkeys(rates, 0.0))
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    finally:
        for group, own in zip(groups, declared, strict=True):
            group.update(own)
        for weight in weights:
            weight.grad = None
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] *= 0  # a number or a tensor


def _torch_adam(kind: type[torch.optim.Adam] | type[torch.optim.AdamW]) -> Factory:
    def make(groups: Groups, rate: float, declared: Declared, device: str) -> torch.optim.Optimizer:
        fused = device.startswith("cuda")  # one kernel over all weights; the CPU has the foreach form by itself
        options: dict[str, Any] = {"betas": declared.betas or ADAM_BETAS, "eps": declared.eps or ADAM_EPS}
        return kind(groups, lr=rate, fused=fused or None, amsgrad=declared.amsgrad, **options)

    return make


OPTIMIZERS.register("adam")(_torch_adam(torch.optim.Adam))
OPTIMIZERS.register("adamw")(_torch_adam(torch.optim.AdamW))


@OPTIMIZERS.register("sgd")
def _sgd(groups: Groups, rate: float, declared: Declared, device: str) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate, momentum=declared.momentum, nesterov=declared.nesterov)


@OPTIMIZERS.register("adafactor")
def _adafactor(groups: Groups, rate: float, declared: Declared, device: str) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # The declared rate and schedule hold: Adafactor's own relative steps would replace both.
    eps = (declared.eps or 1e-30, 1e-3)
    return Adafactor(groups, lr=rate, eps=eps, scale_parameter=False, relative_step=False, warmup_init=False)


@OPTIMIZERS.register("lion")
def _lion(groups: Groups, rate: float, declared: Declared, device: str) -> torch.optim.Optimizer:
    return Lion(groups, lr=rate, betas=declared.betas or LION_BETAS)


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675, alg. 2)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                direction = momentum.lerp(weight.grad, 1 - first).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(weight.grad, 1 - second)


def _bitsandbytes(name: str) -> Factory:
    def make(groups: Groups, rate: float, declared: Declared, device: str) -> torch.optim.Optimizer:
        if not device.startswith("cuda"):
            raise ConfigError(
                "config-conflict",
                f"the optimizer {declared.type!r} keeps its state in 8 bit or pages it, which needs a CUDA GPU",
                where="trainer.optimizer.type",
                received=f"{declared.type} on {device}",
                allowed=("adam", "adamw", "sgd", "adafactor", "lion"),
                fix=f"type: {'lion' if 'lion' in declared.type else 'adamw'}",
            )
        try:
            import bitsandbytes
        except ImportError as error:
            raise missing_extra("bitsandbytes", "bnb", f"the optimizer {declared.type!r}") from error
        lion = "Lion" in name
        options = {} if lion else {"eps": declared.eps or ADAM_EPS}
        betas = declared.betas or (LION_BETAS if lion else ADAM_BETAS)
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=rate, betas=betas, **options)
        return made

    return make


for _name, _class in {
    "adam_8bit": "Adam8bit",
    "adamw_8bit": "AdamW8bit",
    "lion_8bit": "Lion8bit",
    "paged_adam": "PagedAdam32bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adam_8bit": "PagedAdam8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_lion_8bit": "PagedLion8bit",
}.items():
    OPTIMIZERS.register(_name)(_bitsandbytes(_class))
