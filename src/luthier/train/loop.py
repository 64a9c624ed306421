"""The training loop: resume, step until the hooks say stop, keep checkpoints, end with the best weights in place."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from luthier.errors import ConfigError, Interrupted, LuthierError, TrainingError
from luthier.events import Note, Progress, Saved, Stepped, Warned, stage
from luthier.train import checkpoint
from luthier.train.hooks import NOTHING, Best, Decision, Hook, Plateau, Rhythm
from luthier.train.hosted import keep_on_host
from luthier.train.keeping import (
    Run,
    go_on_writing,
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
from luthier.train.passes import passes_that_fit, put_in_force
from luthier.train.schedule import factor
from luthier.train.setup import Outcome, Runner, Setup
from luthier.train.signals import GivenUp
from luthier.train.spike import Spike
from luthier.train.state import new_training
from luthier.train.step import make_state_that_fits, train_step
from luthier.types import Plan

__all__ = ["fit", "optimizer_of", "trainable"]


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
        if resumed is None:
            make_state_that_fits(setup, run.now)
        last = _steps(run)
    except Exception:
        _settle_failed(run)
        raise
    restore_best(run)
    saved = None
    if setup.save_adapter is not None:
        with stage(setup.sink, "save"):
            saved = setup.save_adapter()
        setup.sink(Saved(path=str(saved), step=run.best.step or run.now.step, what=saved.name))  # adapter or weights
    return Outcome(
        steps=run.now.step,
        epochs=run.now.step / setup.source.steps_per_epoch,
        stopped="finished" if run.stopped is None else "early",
        metric=setup.trainer.validation_metric,
        best_step=run.best.step,
        best_value=run.best.value,
        evaluations=tuple(run.best.history),
        train_loss=None if last is None or not math.isfinite(last) else last,
        resumed_from=resumed,
        seconds=time.perf_counter() - started,
        memory_gib=peak_gib(setup.plan.device),
        saved=saved,
    )


def _steps(run: Run) -> float | None:
    """Step until the end, a hook's stop or a signal; the last step's loss."""
    setup = run.setup
    last: float | None = None
    with run.signals.heard():
        setup.sink(Progress(stage="train", completed=run.now.step, total=setup.steps, unit="steps"))
        if run.pending is not None:
            last = _catch_up(run)
            _heed(run)
        while run.now.step < setup.steps and run.stopped is None:
            loss = _one_step(run)
            last = last if loss is None else loss
            go_on_writing(run)
            _heed(run)
        settle(run)
    return last


def _catch_up(run: Run) -> float:
    """Do what a signal had ended after the last step; that step's loss. Its checkpoint is then one like the others."""
    assert run.pending is not None
    loss: float = run.pending["loss"]
    _follow(run, Decision(**run.pending["wanted"]), loss, run.pending["learning_rate"])
    if run.pending is None:
        save(run)
    return loss


def _settle_failed(run: Run) -> None:
    """Let the checkpoint that is being written reach the disk before the process ends with another failure."""
    try:
        settle(run)
    except LuthierError as error:
        run.setup.sink(Warned(text=error.faults[0].message))


def optimizer_of(setup: Setup) -> torch.optim.Optimizer:
    """The declared optimizer over what is trained; its groups know the rate they started with."""
    optimizer = build_optimizer(
        trainable(setup.model).items(),
        setup.trainer.optimizer,
        setup.rate,
        setup.plan.device,
        setup.loraplus_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if setup.plan.optimizer == "host":
        keep_on_host(optimizer)
    return optimizer


def _assemble(setup: Setup) -> Run:
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
    return Run(setup, new_training(setup, optimizer_of(setup)), hooks, best)


def _one_step(run: Run) -> float | None:
    """A step and what follows from it: its loss. None when it failed and an earlier checkpoint was put back instead."""
    before, step = run.setup.source.state(), run.now.step
    try:
        return _step(run)
    except TrainingError as error:
        action = {"training-not-finite": run.setup.trainer.on_nonfinite, "training-spike": "rewind"}.get(error.code)
        record_failure(run, step + 1, before, error)
        if action == "rewind":
            rewind(run, error)
            return None
        if run.now.step == step and not run.now.torn:  # it failed before its update: what is there is whole
            keep_if_finite(run, before)
        raise


def _step(run: Run) -> float:
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
        fix = "lower trainer.learning_rate, or look at the rows"
        raise TrainingError("training-spike", wanted.rewind, received=f"loss {result.loss:.4f}", fix=fix)
    _follow(run, wanted, result.loss, result.values["learning_rate"])
    return result.loss


def _follow(run: Run, wanted: Decision, loss: float, learning_rate: float) -> None:
    """What the hooks want after a step with this loss. An evaluation that a signal ends stays pending."""
    setup, now = run.setup, run.now
    if wanted.evaluate and setup.evaluate is not None:
        run.pending = {"wanted": asdict(wanted), "loss": loss, "learning_rate": learning_rate}
        found = _evaluate(run, loss, learning_rate)
        if found is None:
            return
        wanted, run.pending = wanted + found, None
    if wanted.scale_rate != 1.0:
        now.rate_scale *= wanted.scale_rate
        setup.sink(Note(text=f"validation has stopped improving: learning rate times {wanted.scale_rate:g}"))
    if wanted.stop and now.step < setup.steps:
        run.stopped = wanted.stop
        setup.sink(Note(text=f"stopped early: {wanted.stop}"))
    if wanted.save or run.stopped:
        save(run)


def _evaluate(run: Run, loss: float, learning_rate: float) -> Decision | None:
    """Evaluate, make it known, and ask the hooks; None when a signal ended it before anything came of it.

    The hooks see the values on training rows as ``train/loss`` and so on. They do not see the throughput: what they
    see is kept in checkpoints, and those of a resumed run are those of a straight one.
    """
    setup = run.setup
    assert setup.evaluate is not None
    values = _valued(run, setup.evaluate)
    # without an evaluation of the training rows, the loss of the last step stands for theirs
    training = {"loss": loss} if setup.evaluate_train is None else _valued(run, setup.evaluate_train)
    if values is None or training is None:
        return None
    rate = {"learning_rate": learning_rate}
    _tell(run, "validation", values["loss"], {k: v for k, v in values.items() if k != "loss"} | rate)
    if setup.evaluate_train is not None:
        _tell(run, "train_evaluation", training["loss"], {k: v for k, v in training.items() if k != "loss"} | rate)
    seen = values | {f"train/{name}": value for name, value in training.items()}
    same = {name: value for name, value in seen.items() if name.removeprefix("train/") != "tokens_per_s"}
    return _ask(run, lambda hook: hook.after_evaluation(run.now.step, same))


def _valued(run: Run, evaluate: Callable[[Runner], Mapping[str, float]]) -> dict[str, float] | None:
    """What an evaluation gives, made by rank 0 alone: the hooks of all ranks have to see the same values.

    None when a signal to any rank ended it.
    """
    setup, now, device = run.setup, run.now, run.setup.plan.device
    passes_of = partial(passes_that_fit, setup, now, f"the evaluation after step {now.step}")

    def make() -> dict[str, float] | None:
        random = checkpoint.random_state(device)
        try:
            with run.signals.at_once():
                return dict(evaluate(passes_of))
        except GivenUp:
            checkpoint.set_random_state(random, device)  # wherever it was given up
            return None

    found: dict[str, float] | None = setup.comm.made_by_first(make, run.signals.received, run.signals.pass_on)
    plan = Plan.from_json(setup.comm.share(asdict(now.plan)))
    if plan != now.plan:  # rank 0 ran out of memory, and all have to cut the next step as it does
        put_in_force(setup, now, plan)
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
    run.told[split] = Stepped(step=step, total_steps=total, epoch=epoch, split=split, loss=loss, values=values)
    run.setup.sink(run.told[split])


def _heed(run: Run) -> None:
    """Where a signal has come, end after the last finished step, with its checkpoint; all ranks after the same one."""
    received = run.signals.received
    if not run.setup.comm.any(bool(received)):
        return
    number = received[0] if received else signal.SIGTERM
    save(run)
    settle(run)
    again = " (its evaluation will be done again)" if run.pending is not None else ""
    place = f"after step {run.now.step} of {run.setup.steps}{again}"
    raise Interrupted(
        number,
        f"ended by {signal.Signals(number).name} {place}; nothing is lost",
        where=str(checkpoint.path_of(run.setup.checkpoints, run.now.step)),
        fix=f"to go on: {run.setup.resume_hint}",
    )


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
