"""The training loop: resume, step until the hooks say stop, keep checkpoints, end with the best weights in place."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from luthier.errors import ConfigError, Interrupted, LuthierError, TrainingError
from luthier.events import Note, Progress, Saved, Stepped, Warned, stage
from luthier.train import checkpoint
from luthier.train.hooks import NOTHING, Best, Decision, Hook, Plateau, Rhythm
from luthier.train.keeping import (
    Run,
    keep_if_finite,
    record_failure,
    restore_best,
    resume,
    rewind,
    save,
    settle,
    trainable,
)
from luthier.train.memory import peak_gib
from luthier.train.optimizer import build_optimizer
from luthier.train.schedule import factor
from luthier.train.setup import Outcome, Setup
from luthier.train.spike import Spike
from luthier.train.step import StepResult, new_training, train_step

__all__ = ["fit", "trainable"]


def fit(setup: Setup) -> Outcome:
    """Train to the end, going on from the newest whole checkpoint if there is one.

    Raises TrainingError (not finite, no memory), RunError (checkpoints), Interrupted (SIGINT, SIGTERM).
    """
    started = time.perf_counter()
    _require_scalable(setup)
    run = _assemble(setup)
    resumed = resume(run)
    setup.comm.spread(list(trainable(setup.model).values()))
    setup.model.train()
    try:
        last = _steps(run)
    except Exception:
        _settle_failed(run)
        raise
    restore_best(run)
    saved = None
    if setup.save_adapter is not None:
        with stage(setup.sink, "save"):
            saved = setup.save_adapter()
        setup.sink(Saved(path=str(saved), step=run.best.step or run.now.step, what="adapter"))
    return Outcome(
        steps=run.now.step,
        epochs=run.now.step / setup.source.steps_per_epoch,
        stopped="finished" if run.stopped is None else "early",
        metric=setup.trainer.validation_metric,
        best_step=run.best.step,
        best_value=run.best.value,
        evaluations=tuple(run.best.history),
        train_loss=None if last is None or not math.isfinite(last.loss) else last.loss,
        resumed_from=resumed,
        seconds=time.perf_counter() - started,
        memory_gib=peak_gib(setup.plan.device),
        saved=saved,
    )


def _steps(run: Run) -> StepResult | None:
    """Step until the end, a hook's stop or a signal; the last step's result."""
    setup = run.setup
    last: StepResult | None = None
    with _signals() as received:
        setup.sink(Progress(stage="train", completed=run.now.step, total=setup.steps, unit="steps"))
        while run.now.step < setup.steps and run.stopped is None:
            last = _one_step(run) or last
            if run.saver.done:
                settle(run)
            if setup.comm.any(bool(received)):  # all ranks end after the same step
                _interrupt(run, received[0] if received else signal.SIGTERM)
        settle(run)
    return last


def _settle_failed(run: Run) -> None:
    """Let the checkpoint that is being written reach the disk before the process ends with another failure."""
    try:
        settle(run)
    except LuthierError as error:
        run.setup.sink(Warned(text=error.faults[0].message))


def _assemble(setup: Setup) -> Run:
    optimizer = build_optimizer(
        trainable(setup.model).items(),
        setup.trainer.optimizer,
        setup.rate,
        setup.plan.device,
        setup.loraplus_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    trainer, scheduler = setup.trainer, setup.trainer.learning_rate_scheduler
    best = Best(trainer.validation_metric, trainer.early_stop)
    rhythm = Rhythm(trainer, setup.source.steps_per_epoch, setup.steps_per_evaluation, setup.steps)
    spike = Spike(trainer.spike_window, trainer.spike_threshold, rewind=trainer.on_spike == "rewind")
    hooks: dict[str, Hook] = {"rhythm": rhythm, "best": best, "spike": spike}
    if scheduler.reduce_on_plateau:
        hooks["plateau"] = Plateau(
            ("train/" if scheduler.reduce_eval_split == "training" else "") + scheduler.reduce_eval_metric,
            scheduler.reduce_on_plateau,
            scheduler.reduce_on_plateau_patience,
            scheduler.reduce_on_plateau_rate,
        )
    return Run(setup, new_training(setup, optimizer), hooks, best)


def _one_step(run: Run) -> StepResult | None:
    """A step and what follows from it; None when it failed and an earlier checkpoint was put back instead."""
    before, step = run.setup.source.state(), run.now.step
    try:
        return _step(run)
    except TrainingError as error:
        action = {"training-not-finite": run.setup.trainer.on_nonfinite, "training-spike": "rewind"}.get(error.code)
        record_failure(run, step + 1, before, error)
        if action == "rewind":
            rewind(run, error)
            return None
        if run.now.step == step:  # it failed before its update: what is there is whole
            keep_if_finite(run, before)
        raise


def _step(run: Run) -> StepResult:
    """A step, what it makes known, and what the hooks want after it."""
    setup, now = run.setup, run.now
    scheduler = setup.trainer.learning_rate_scheduler
    rate = factor(scheduler, now.step, setup.steps, setup.steps_per_evaluation, setup.rate)
    result = train_step(setup, now, rate)
    _tell(run, "train", result.loss, dict(result.values))
    setup.sink(Progress(stage="train", completed=now.step, total=setup.steps, unit="steps"))
    wanted = _ask(run, lambda hook: hook.after_step(now.step, result.loss))
    if wanted.warn:
        setup.sink(Warned(text=wanted.warn))
    if wanted.rewind:
        raise TrainingError("training-spike", wanted.rewind, fix="lower trainer.learning_rate, or look at the rows")
    if wanted.evaluate and setup.evaluate is not None:
        wanted += _evaluate(run, result)
    if wanted.scale_rate != 1.0:
        now.rate_scale *= wanted.scale_rate
        setup.sink(Note(text=f"validation has stopped improving: learning rate times {wanted.scale_rate:g}"))
    if wanted.stop and now.step < setup.steps:
        run.stopped = wanted.stop
        setup.sink(Note(text=f"stopped early: {wanted.stop}"))
    if wanted.save or run.stopped:
        save(run)
    return result


def _evaluate(run: Run, result: StepResult) -> Decision:
    """Evaluate, make it known, and ask the hooks. They see the values on training rows as ``train/loss`` and so on."""
    setup = run.setup
    assert setup.evaluate is not None
    rate = {"learning_rate": result.values["learning_rate"]}
    values = _valued(setup, setup.evaluate)
    _tell(run, "validation", values["loss"], {k: v for k, v in values.items() if k != "loss"} | rate)
    # without an evaluation of the training rows, the loss of the last step stands for theirs
    training = {"loss": result.loss} if setup.evaluate_train is None else _valued(setup, setup.evaluate_train)
    if setup.evaluate_train is not None:
        _tell(run, "train_evaluation", training["loss"], {k: v for k, v in training.items() if k != "loss"} | rate)
    seen = values | {f"train/{name}": value for name, value in training.items()}
    return _ask(run, lambda hook: hook.after_evaluation(run.now.step, seen))


def _valued(setup: Setup, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What an evaluation gives, made by rank 0 alone: the hooks of all ranks have to see the same values."""
    found: dict[str, float] = setup.comm.share(dict(evaluate()) if setup.comm.rank == 0 else None)
    return found


def _ask(run: Run, question: Any) -> Decision:
    wanted = NOTHING
    for hook in run.hooks.values():
        wanted += question(hook)
    return wanted


def _tell(run: Run, split: str, loss: float, values: dict[str, float]) -> None:
    step = run.now.step
    epoch = step / run.setup.source.steps_per_epoch
    total = run.setup.steps
    values.setdefault("memory_gib", round(peak_gib(run.setup.plan.device), 4))
    run.setup.sink(Stepped(step=step, total_steps=total, epoch=epoch, split=split, loss=loss, values=values))


def _interrupt(run: Run, number: int) -> None:
    """End after the step that was under way, with its checkpoint."""
    save(run)
    settle(run)
    raise Interrupted(
        number,
        f"ended by {signal.Signals(number).name} after step {run.now.step} of {run.setup.steps}; nothing is lost",
        where=str(checkpoint.path_of(run.setup.checkpoints, run.now.step)),
        fix=f"to go on: {run.setup.resume_hint}",
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the end of the step; a second one takes its usual effect at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_scalable(setup: Setup) -> None:
    """fp16 gradients are scaled, and scaled gradients need weights in fp32."""
    if setup.precision != "fp16":
        return
    wrong = [name for name, weight in trainable(setup.model).items() if weight.dtype == torch.float16]
    if wrong:
        raise ConfigError(
            "config-conflict",
            "precision fp16 cannot train weights that are stored in fp16 themselves",
            where="trainer.precision",
            received=wrong[0],
            fix="use an adapter, or precision: fp32",
        )
