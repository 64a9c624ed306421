"""The `trainer.learning_rate_scheduler` section. Steps are optimizer steps."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from luthier.config.section import Conflict, Float, Int, Section, key


class Schedule(Section):
    """How the learning rate moves: warm-up, decay, reduction on a plateau."""

    decay: Literal["constant", "linear", "cosine", "exponential"] | None = key(
        "cosine",
        "How the rate falls after the warm-up; empty or constant: it does not.",
        ludwig=None,
        why="ends with small steps; a constant rate was found to do as well (Pareja et al. 2024, arXiv 2412.13337)",
        source="the recipe of Stanford Alpaca, Taori et al. 2023; Loshchilov and Hutter 2017, SGDR, arXiv 1608.03983",
    )
    decay_rate: Float = key(0.96, "Factor of exponential decay every decay_steps.", gt=0, le=1)
    decay_steps: Int = key(10000, "Steps in which exponential decay applies decay_rate once.", ge=1)
    staircase: bool = key(False, "Exponential decay in whole stairs of decay_steps.")
    warmup_fraction: Float = key(
        0.03,
        "Share of all optimizer steps in which the rate rises from 0.",
        ludwig=0.0,
        why="steadies the start",
        source="the recipes of Stanford Alpaca, Taori et al. 2023, and QLoRA, Dettmers et al. 2023, arXiv 2305.14314",
        ge=0,
        le=1,
    )
    warmup_steps: Int | None = key(
        None, "Warm-up in optimizer steps, instead of warmup_fraction; cut to the run's steps, which is told.", ge=0
    )
    warmup_evaluations: Float = key(0, "Warm-up in evaluations, instead of warmup_fraction; cut likewise.", ge=0)
    eta_min: Float = key(
        0.0, "Rate at the end of linear and cosine decay, as an absolute rate; at most the learning rate.", ge=0
    )
    reduce_on_plateau: Int = key(0, "How many times the rate is cut when the metric stalls; 0 is off.", ge=0)
    reduce_on_plateau_patience: Int = key(10, "Evaluations in a row without progress before a cut; 0 is as 1.", ge=0)
    reduce_on_plateau_rate: Float = key(0.1, "Factor of a cut.", gt=0, lt=1)
    reduce_eval_metric: str = key("loss", "The metric that is watched for a plateau.")
    reduce_eval_split: Literal["training", "validation"] = key(
        "validation", "The split that is watched for a plateau.", ludwig="training", why="training loss always falls"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, data: object) -> object:
        """Warm-up given in steps or evaluations replaces the default fraction."""
        if (
            isinstance(data, dict)
            and "warmup_fraction" not in data
            and (data.get("warmup_steps") is not None or data.get("warmup_evaluations"))
        ):
            return {**data, "warmup_fraction": 0.0}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if sum(map(bool, (self.warmup_fraction, self.warmup_steps, self.warmup_evaluations))) > 1:
            given = {name: getattr(self, name) for name in ("warmup_fraction", "warmup_steps", "warmup_evaluations")}
            raise Conflict(
                "the warm-up is given in more than one way",
                received=", ".join(f"{name}: {value}" for name, value in given.items() if value),
                allowed=f"one of {', '.join(given)}",
                fix="give one of warmup_fraction, warmup_steps and warmup_evaluations",
            )
        return self
