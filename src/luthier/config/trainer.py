"""The `trainer:` section: what is learned and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from luthier.config.optimizer import GradientClipping, Optimizer
from luthier.config.schedule import Schedule
from luthier.config.section import Auto, Conflict, Float, Int, Section, key

Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]
ADAPTER_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5


Count = Annotated[Int, Field(ge=1)]  # apart from a union, where a limit would be put on the word auto too


class Trainer(Section):
    """What is learned and for how long."""

    type: Literal["finetune", "none"] = key(
        "finetune", "finetune trains; none uses the base as it is.", ludwig="none", why="training is what this is for"
    )
    learning_rate: Float = key(
        ADAPTER_LEARNING_RATE,
        "Peak learning rate. With `adapter: null` the default is 2e-5.",
        ludwig=1e-3,
        why="an adapter takes ten times the rate of full fine-tuning",
        source="TRL's documentation (PEFT integration) and Schulman et al. 2025, LoRA Without Regret; 2e-4 also "
        "Dettmers et al. 2023, QLoRA, arXiv 2305.14314, 2e-5 the recipe of Stanford Alpaca, Taori et al. 2023",
        gt=0,
        le=10,
    )
    epochs: Int = key(
        3,
        "Times every training row is seen.",
        ludwig=100,
        why="more repeats the data by heart",
        source="the recipe of Stanford Alpaca, Taori et al. 2023; Unsloth's guide to LoRA's hyperparameters: 1 to 3",
        ge=1,
    )
    train_steps: Int | None = key(None, "Optimizer steps in all, instead of epochs.", ge=1)
    batch_size: Count | Auto = key(
        16,
        "Rows of a batch; times gradient_accumulation_steps it is the effective batch, which alone matters: "
        "how many rows go through at once is planned. auto: 16 over gradient_accumulation_steps.",
        ludwig=1,
        why="one row an update is noisy",
        source="Unsloth's guide to LoRA's hyperparameters; Dettmers et al. 2023, QLoRA, arXiv 2305.14314 (7B and 13B); "
        "Schulman et al. 2025, LoRA Without Regret: LoRA bears large batches worse than full fine-tuning does",
    )
    gradient_accumulation_steps: Count | Auto = key(
        1, "Batches of one optimizer step. auto: 16 over batch_size.", ludwig="auto"
    )
    eval_batch_size: Count | Auto | None = key(None, "Rows at once at evaluation; empty or auto: planned.", ludwig=2)
    optimizer: Optimizer = key(Optimizer, "How gradients become updates.")
    learning_rate_scheduler: Schedule = key(Schedule, "How the learning rate moves.")
    gradient_clipping: GradientClipping = key(GradientClipping, "Bounds on the gradient.")
    loss_normalization: Literal["token", "sample", "micro_batch"] = key(
        "token",
        "token: the mean over the supervised tokens of the effective batch; sample: every row weighs the same; "
        "micro_batch: every batch of batch_size rows weighs the same, whatever the tokens in it.",
        ludwig="micro_batch",
        why="does not depend on how the batch is cut",
        source="Hugging Face 2024, Fixing Gradient Accumulation, huggingface.co/blog/gradient_accumulation",
    )
    early_stop: Int = key(
        5, "Evaluations in a row without progress after which training stops; -1 and 0: never, as in Ludwig.", ge=-1
    )
    validation_metric: str = key("loss", "Metric that picks the best checkpoint and stops early.")
    validation_field: str | None = key(None, "Output feature whose metric is watched; empty: the only one.")
    evaluate_training_set: bool = key(False, "Evaluate on the training rows too.")
    steps_per_evaluation: Int | None = key(None, "Optimizer steps between evaluations; empty: once an epoch.", ge=1)
    max_eval_rows: Int | None = key(None, "Most rows of an evaluation's loss; empty: all.", ge=1)
    eval_generation_rows: Int | None = key(
        16,
        "Rows of an evaluation whose answers are generated and scored; 0 is none, empty is all.",
        ludwig=None,
        why="generating takes longer than the loss of the same rows",
        ge=0,
    )
    steps_per_checkpoint: Int = key(0, "Optimizer steps between checkpoints; 0: by checkpoints_per_epoch.", ge=0)
    checkpoints_per_epoch: Int = key(0, "Checkpoints an epoch; 0: one, with the evaluation.", ge=0)
    keep_last: Int = key(2, "Checkpoints kept beside the best.", ge=1)
    on_nonfinite: Literal["stop", "skip_step", "rewind"] = key(
        "stop",
        "A loss or gradient that is NaN or infinite, before it updates anything. stop: end with the state before it; "
        "skip_step: pass its rows over, at most 20 steps in a row; rewind: put the newest checkpoint back and pass "
        "over the rows taken since, at most 10 times a run.",
    )
    on_spike: Literal["warn", "rewind"] = key(
        "warn",
        "A step whose loss is above median + spike_threshold × MAD of the last spike_window steps (MAD: the median "
        "distance from the median, at least 1 % of it). warn: say so; rewind: as in on_nonfinite.",
    )
    spike_window: Int = key(32, "Steps that on_spike compares with; before so many are done it sees no spike.", ge=8)
    spike_threshold: Float = key(10.0, "How many MADs above the median make a spike.", gt=0)
    should_shuffle: bool = key(True, "Draw the rows in a new order every epoch.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key(
        "auto", "Type of the arithmetic; auto: bf16 where the hardware has it, else fp16 or fp32."
    )
    use_mixed_precision: bool | None = key(
        None,
        "Ludwig's switch: true trains in 16 bits as precision says, false in fp32; empty: precision decides.",
        ludwig=False,
    )
    enable_gradient_checkpointing: bool | Auto = key(
        "auto",
        "Recompute activations to save memory. true: of all layers; false: of none, even if the run then does not fit; "
        "auto: of as few as memory asks for.",
        ludwig_note="false: never, unless asked for",
        why="planned, also with `defaults: ludwig`; changes no gradient",
    )
    compile: bool = key(False, "Compile the model with torch.compile: refused, it takes longer here than it saves.")
    track: tuple[Tracker, ...] = key((), "Trackers that receive the metrics as well.")

    @model_validator(mode="before")
    @classmethod
    def _one_value(cls, data: Any) -> Any:
        """One tracker may stand without brackets."""
        if isinstance(data, dict) and isinstance(data.get("track"), str):
            return {**data, "track": [data["track"]]}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Trainer:
        if self.use_mixed_precision is False and self.precision in ("bf16", "fp16"):
            raise Conflict(
                f"use_mixed_precision is false and precision is {self.precision}",
                received=f"use_mixed_precision: false, precision: {self.precision}",
                allowed="precision: fp32 or auto with use_mixed_precision: false",
                fix="leave use_mixed_precision out: precision says it",
            )
        if self.use_mixed_precision and self.precision == "fp32":
            raise Conflict(
                "use_mixed_precision is true and precision is fp32",
                received="use_mixed_precision: true, precision: fp32",
                allowed="precision: auto, bf16 or fp16 with use_mixed_precision: true",
                fix="leave use_mixed_precision out: precision says it",
            )
        peak, floor = self.optimizer.lr or self.learning_rate, self.learning_rate_scheduler.eta_min
        if floor > peak:
            named = "learning_rate" if self.optimizer.lr is None else "optimizer.lr"
            raise Conflict(
                "learning_rate_scheduler.eta_min, which the rate falls to, is over the one that it falls from",
                received=f"eta_min: {floor:g}, {named}: {peak:g}",
                allowed=f"eta_min of at most {peak:g}",
                fix=f"lower eta_min, or raise {named}",
            )
        if self.steps_per_checkpoint and self.checkpoints_per_epoch:
            raise Conflict(
                "how often a checkpoint is made is given in two ways",
                received=f"steps_per_checkpoint: {self.steps_per_checkpoint}, "
                f"checkpoints_per_epoch: {self.checkpoints_per_epoch}",
                allowed="one of steps_per_checkpoint and checkpoints_per_epoch",
                fix="give one of steps_per_checkpoint and checkpoints_per_epoch",
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Rows of one batch, of which gradient_accumulation_steps make an effective batch."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        steps = self.gradient_accumulation_steps
        return self.effective_batch // steps if isinstance(steps, int) else self.effective_batch

    @property
    def effective_batch(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        size, accumulation = self.batch_size, self.gradient_accumulation_steps
        if isinstance(size, int) and isinstance(accumulation, int):
            return size * accumulation
        if isinstance(size, int):
            return size * max(1, 16 // size)
        return max(16, accumulation) if isinstance(accumulation, int) else 16
