"""The training that is planned, as numbers: what memory and time depend on, and nothing of how it is executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.share import saved_of
from luthier.data.source import order
from luthier.plan.passes import Steps
from luthier.plan.precision import Precision, declared_precision, resolve_precision
from luthier.plan.shape import Shape
from luthier.plan.trained import Trained, trained
from luthier.types import Beginnings, DataStats, Machine, ModelSpec

SIMULATED = 2000  # steps whose lengths are looked at, from the first on

# Bytes of optimizer state for each trained weight.
STATE = {"adam": 8, "adamw": 8, "sgd": 0, "adafactor": 0.1, "lion": 4, "adamw_8bit": 2.03, "adam_8bit": 2.03,
         "lion_8bit": 1.02, "paged_adamw": 8, "paged_adam": 8, "paged_adamw_8bit": 2.03, "paged_adam_8bit": 2.03,
         "paged_lion_8bit": 1.02}  # fmt: skip


def state_of(optimizer: Any) -> float:
    """Bytes that the declared optimizer (`trainer.optimizer`) remembers for each trained weight."""
    return STATE[optimizer.type] + (4 if optimizer.type == "sgd" and optimizer.momentum else 0)


def movable(optimizer: Any) -> bool:
    """Whether what it remembers is plain tensors, which can wait on the host."""
    return state_of(optimizer) > 0 and not optimizer.type.startswith("paged") and not optimizer.type.endswith("8bit")


@dataclass(frozen=True, slots=True)
class Job:
    """One training. ``steps``: the lengths of the rows of each simulated step; ``share``: trained tokens of all."""

    shape: Shape
    trained: Trained
    precision: Precision
    bits: int | None
    double: bool
    dropout: float
    batch: int
    rows: int
    tokens: int  # of one epoch
    share: float
    longest: int
    shared: int  # tokens that all rows start with, which the decoder can compute once a pass; 0 where that is unknown
    seen: bool  # whether it was looked for
    beginnings: Beginnings  # what parts of the rows start with, all of them one part where they share something
    steps: Steps
    total_steps: int
    steps_per_epoch: int
    evaluations: int  # where rows are held out
    scored: int | None  # most rows of an evaluation's loss
    scores_training: bool  # training rows are evaluated too
    state: float  # bytes of optimizer state for each trained weight
    paged: bool
    movable: bool  # that can wait on the host
    fused: bool  # the optimizer updates in one kernel on a GPU, without buffers of its own
    noise: bool  # NEFTune
    answer: int  # tokens of a generated answer
    answers: int  # rows that are answered at an evaluation
    answered: int  # rows answered at one time, at least

    @classmethod
    def of(cls, config: Any, spec: ModelSpec, stats: DataStats, machine: Machine) -> Job:
        """The numbers of a config on data. Raises ConfigError for a precision that the machine cannot do."""
        trainer, quantization = config.trainer, config.quantization
        shape = Shape.of(spec)
        rows, batch = len(stats.lengths), trainer.effective_batch
        per_epoch = max(1, -(-rows // batch))
        total = trainer.train_steps or trainer.epochs * per_epoch
        kind = trainer.optimizer.type
        return cls(
            shape=shape,
            trained=trained(config.adapter, shape),
            precision=resolve_precision(declared_precision(config), machine),
            bits=quantization.bits if quantization else None,
            double=bool(quantization and quantization.bnb_4bit_use_double_quant),
            dropout=float(getattr(config.adapter, "dropout", 0.0) or 0.0),
            batch=batch,
            rows=rows,
            tokens=stats.tokens,
            share=stats.supervised_tokens / stats.tokens if stats.tokens else 0.0,
            longest=max(stats.longest, 1),
            shared=stats.shared_prefix or 0,
            seen=stats.shared_prefix is not None,
            beginnings=stats.beginnings or (((1.0, stats.shared_prefix),) if stats.shared_prefix else ()),
            steps=_steps(config, stats, batch, min(total, SIMULATED)),
            total_steps=total,
            steps_per_epoch=per_epoch,
            evaluations=-(-total // (trainer.steps_per_evaluation or per_epoch)),  # the last step's is one of them
            scored=trainer.max_eval_rows,
            scores_training=trainer.evaluate_training_set,
            state=state_of(trainer.optimizer),
            paged=kind.startswith("paged"),
            movable=movable(trainer.optimizer),
            fused=kind in ("adam", "adamw"),
            noise=bool(config.model_parameters.neftune_noise_alpha),
            answer=config.generation.max_new_tokens or 256,
            answers=_answers(config, rows),
            answered=trainer.eval_batch_size if isinstance(trainer.eval_batch_size, int) else 1,
        )

    @property
    def compute(self) -> int:
        """Bytes of a number in the arithmetic."""
        return 4 if self.precision == "fp32" else 2

    @property
    def fill(self) -> float:
        """Real tokens of all, where the rows of a step are padded to its longest."""
        padded = sum(len(rows) * max(rows) for rows in self.steps)
        return sum(map(sum, self.steps)) / padded if padded else 1.0

    @property
    def real(self) -> float:
        """Tokens of the rows of a large pass for each one that is computed, where their beginning is shared."""
        mean = self.tokens / max(self.rows, 1)
        return mean / max(mean - self.shared, 1.0)

    def held(self, rows: Sequence[int], model: str, share: bool = False) -> int:
        """Tokens that a pass of ``rows`` has at most: padded on the generic path; what all start with, once."""
        if model == "generic":
            return len(rows) * max(rows)
        return sum(rows) - (len(rows) - 1) * self.shared * share

    def computed(self, rows: Sequence[int], model: str, share: bool = False) -> int:
        """As `held`, on average: what a part of the rows starts with is computed once too."""
        most = self.held(rows, model, share)
        if not share or model == "generic":
            return most
        return max(min(most, round(sum(rows) - saved_of(self.beginnings, len(rows)))), 1)

    def most(self, model: str, share: bool = False) -> int:
        """Tokens that the largest simulated step has in one pass, at most."""
        return max((self.held(rows, model, share) for rows in self.steps), default=self.longest)


def _answers(config: Any, rows: int) -> int:
    """Validation rows that an evaluation answers; where those are all, as many as the split gives beside ``rows``."""
    declared = config.trainer.eval_generation_rows
    if declared is not None:
        return int(declared)
    train, validation, _ = config.preprocessing.split.probabilities
    return max(1, int(rows * validation / train + 0.5))


def _steps(config: Any, stats: DataStats, batch: int, count: int) -> Steps:
    """Lengths of the rows of the first ``count`` steps, in the very order of the run."""
    out: list[tuple[int, ...]] = []
    epoch = 0
    while stats.lengths and len(out) < count:
        shuffle = config.trainer.should_shuffle
        indices = order(len(stats.lengths), epoch, config.random_seed, stats.data_hash, shuffle)
        starts = range(0, len(indices), batch)[: count - len(out)]
        out += [tuple(stats.lengths[i] for i in indices[start : start + batch]) for start in starts]
        epoch += 1
    return Steps(out[:count])
