"""The training loop: resume, step until the hooks say stop, keep checkpoints, end with the best weights in place."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from luthier.errors import ConfigError, Interrupted, RunError, TrainingError
from luthier.events import Note, Progress, Saved, Stepped, Warned, stage
from luthier.run import atomic
from luthier.train import checkpoint
from luthier.train.hooks import NOTHING, Best, Decision, Hook, Plateau, Rhythm
from luthier.train.memory import peak_gib
from luthier.train.optimizer import build_optimizer
from luthier.train.schedule import factor
from luthier.train.setup import Outcome, Setup
from luthier.train.step import StepResult, Training, new_training, train_step


@dataclass
class _Run:
    """The moving parts of one `fit`."""

    setup: Setup
    now: Training
    hooks: dict[str, Hook]
    best: Best
    saved_step: int = -1
    stopped: str | None = None


def fit(setup: Setup) -> Outcome:
    """Train to the end, going on from the newest whole checkpoint if there is one.

    Raises TrainingError (not finite, no memory), RunError (checkpoints), Interrupted (SIGINT, SIGTERM).
    """
    started = time.perf_counter()
    _require_scalable(setup)
    run = _assemble(setup)
    resumed = _resume(run)
    setup.model.train()
    last: StepResult | None = None
    with _signals() as received:
        setup.sink(Progress(stage="train", completed=run.now.step, total=setup.steps, unit="steps"))
        while run.now.step < setup.steps and run.stopped is None:
            last = _one_step(run)
            if received:
                _interrupt(run, received[0])
    _restore_best(run)
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
        train_loss=None if last is None else last.loss,
        resumed_from=resumed,
        seconds=time.perf_counter() - started,
        memory_gib=peak_gib(setup.plan.device),
        saved=saved,
    )


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _assemble(setup: Setup) -> _Run:
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
    hooks: dict[str, Hook] = {"rhythm": rhythm, "best": best}
    if scheduler.reduce_on_plateau:
        hooks["plateau"] = Plateau(
            ("train/" if scheduler.reduce_eval_split == "training" else "") + scheduler.reduce_eval_metric,
            scheduler.reduce_on_plateau,
            scheduler.reduce_on_plateau_patience,
            scheduler.reduce_on_plateau_rate,
        )
    return _Run(setup, new_training(setup, optimizer), hooks, best)


def _one_step(run: _Run) -> StepResult:
    """A step, what it makes known, and what the hooks want after it."""
    setup, now = run.setup, run.now
    scheduler = setup.trainer.learning_rate_scheduler
    rate = factor(scheduler, now.step, setup.steps, setup.steps_per_evaluation, setup.rate)
    before = setup.source.state()
    try:
        result = train_step(setup, now, rate)
    except TrainingError as error:
        _dump(run, before, error)
        raise
    _tell(run, "train", result.loss, dict(result.values))
    setup.sink(Progress(stage="train", completed=now.step, total=setup.steps, unit="steps"))
    wanted = _ask(run, lambda hook: hook.after_step(now.step))
    if wanted.evaluate and setup.evaluate is not None:
        wanted += _evaluate(run, result)
    if wanted.scale_rate != 1.0:
        now.rate_scale *= wanted.scale_rate
        setup.sink(Note(text=f"validation has stopped improving: learning rate times {wanted.scale_rate:g}"))
    if wanted.stop and now.step < setup.steps:
        run.stopped = wanted.stop
        setup.sink(Note(text=f"stopped early: {wanted.stop}"))
    if wanted.save or run.stopped:
        _save(run)
    return result


def _evaluate(run: _Run, result: StepResult) -> Decision:
    """Evaluate, make it known, and ask the hooks. They see the values on training rows as ``train/loss`` and so on."""
    setup = run.setup
    assert setup.evaluate is not None
    rate = {"learning_rate": result.values["learning_rate"]}
    values = dict(setup.evaluate())
    _tell(run, "validation", values["loss"], {k: v for k, v in values.items() if k != "loss"} | rate)
    # without an evaluation of the training rows, the loss of the last step stands for theirs
    training = {"loss": result.loss} if setup.evaluate_train is None else dict(setup.evaluate_train())
    if setup.evaluate_train is not None:
        _tell(run, "train_evaluation", training["loss"], {k: v for k, v in training.items() if k != "loss"} | rate)
    seen = values | {f"train/{name}": value for name, value in training.items()}
    return _ask(run, lambda hook: hook.after_evaluation(run.now.step, seen))


def _ask(run: _Run, question: Any) -> Decision:
    wanted = NOTHING
    for hook in run.hooks.values():
        wanted += question(hook)
    return wanted


def _tell(run: _Run, split: str, loss: float, values: dict[str, float]) -> None:
    step = run.now.step
    epoch = step / run.setup.source.steps_per_epoch
    total = run.setup.steps
    values.setdefault("memory_gib", round(peak_gib(run.setup.plan.device), 4))
    run.setup.sink(Stepped(step=step, total_steps=total, epoch=epoch, split=split, loss=loss, values=values))


def _save(run: _Run, source: dict[str, int] | None = None) -> None:
    """Write the checkpoint of the last finished step and delete those that are no longer needed."""
    setup, now = run.setup, run.now
    if now.step == run.saved_step:
        return
    state = {
        "source": source or setup.source.state(),
        "hooks": {name: hook.state() for name, hook in run.hooks.items()},
        "rate_scale": now.rate_scale,
        "scaler": now.scaler.state_dict(),
        "tokens_per_pass": now.plan.tokens_per_pass,
        "stopped": run.stopped,
        "random": checkpoint.random_state(setup.plan.device),
    }
    kept = {**now.optimizer.state_dict(), "model": dict(setup.model_state()) if setup.model_state else {}}
    path = checkpoint.save(setup.checkpoints, now.step, trainable(setup.model), kept, state)
    run.saved_step = now.step
    checkpoint.prune(setup.checkpoints, setup.trainer.keep_last, () if run.best.step is None else (run.best.step,))
    setup.sink(Saved(path=str(path), step=now.step))


def _resume(run: _Run) -> int | None:
    """Go on from the newest whole checkpoint; a damaged one is passed over with a warning. None: a new run."""
    setup = run.setup
    steps = checkpoint.steps_in(setup.checkpoints)
    for step in reversed(steps):
        try:
            found = checkpoint.load(setup.checkpoints, step)
        except RunError as error:
            if step == steps[0]:
                raise
            setup.sink(Warned(text=f"{error.faults[0].message}; going on from the one before it"))
            continue
        _put_weights(setup, found)
        model = found.optimizer.pop("model", {})
        if setup.restore_model is not None and model:
            setup.restore_model(model)
        run.now.optimizer.load_state_dict(found.optimizer)
        setup.source.restore(found.state["source"])
        for name, hook in run.hooks.items():
            hook.restore(found.state["hooks"][name])
        run.now.step = run.saved_step = step
        run.now.rate_scale = found.state["rate_scale"]
        run.now.scaler.load_state_dict(found.state["scaler"])
        run.stopped = found.state["stopped"]
        checkpoint.set_random_state(found.state["random"], setup.plan.device)
        setup.sink(Note(text=f"going on from step {step} of {setup.steps}", data={"step": step}))
        return step
    return None


def _restore_best(run: _Run) -> None:
    """Put the weights of the best evaluation back into the model."""
    best = run.best.step
    if best is None or best == run.now.step:
        return
    _put_weights(run.setup, checkpoint.load(run.setup.checkpoints, best))
    metric, value = run.best.metric, run.best.value
    run.setup.sink(Note(text=f"best checkpoint restored: step {best}, {metric} {value:.4f}", data={"step": best}))


def _put_weights(setup: Setup, found: checkpoint.Checkpoint) -> None:
    mine = trainable(setup.model)
    wrong = sorted(mine.keys() ^ found.weights.keys())
    wrong += [name for name in mine.keys() & found.weights.keys() if mine[name].shape != found.weights[name].shape]
    if wrong:
        raise RunError(
            "run-damaged",
            f"the checkpoint of step {found.step} does not fit the model: {', '.join(wrong[:5])}",
            where=str(checkpoint.path_of(setup.checkpoints, found.step)),
            fix="choose another --output folder",
        )
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(found.weights[name])


def _dump(run: _Run, source: dict[str, int], error: TrainingError) -> None:
    """Save the state before the step that failed, and a record of it, so that it can be looked at or repeated."""
    if run.now.step:
        _save(run, source)
    run.setup.checkpoints.mkdir(parents=True, exist_ok=True)
    record = {"step": run.now.step + 1, "source": source, "faults": [fault.to_json() for fault in error.faults]}
    atomic.write_json(run.setup.checkpoints / "failed-step.json", record)


def _interrupt(run: _Run, number: int) -> None:
    """End after the step that was under way, with its checkpoint."""
    _save(run)
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
