"""What a run keeps on disk and puts back: checkpoints of finished steps, the best weights, a failure's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.errors import RunError, TrainingError
from luthier.events import Note, Rewound, Saved, Stepped, Warned
from luthier.run import atomic
from luthier.run.metrics import line_of
from luthier.train import checkpoint
from luthier.train.hooks import Best, Hook
from luthier.train.saver import Saver, affordable
from luthier.train.setup import Setup
from luthier.train.signals import Signals
from luthier.train.state import Training

MAX_REWINDS = 10  # of a run; more of them would not be bad luck
PATIENCE = 1.0  # seconds that a step waits for the write before its own; a disk that is slower writes fewer checkpoints


@dataclass
class Run:
    """The moving parts of one `loop.fit`.

    pending: what follows the last step and was given up for a signal, as JSON types: it is done again on going on.
    told: the last metrics of each split that this process has told of.
    waiting: what is written after the checkpoint that is being written, in this order: at most the best and the newest.
    """

    setup: Setup
    now: Training
    hooks: dict[str, Hook]
    best: Best
    saver: Saver = field(default_factory=Saver)
    waiting: list[checkpoint.Snapshot] = field(default_factory=list)
    saved_step: int = -1
    stopped: str | None = None
    rewinds: int = 0
    rewound_to: int | None = None
    pending: dict[str, Any] | None = None
    told: dict[str, Stepped] = field(default_factory=dict)
    signals: Signals = field(default_factory=Signals)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save(run: Run, source: Mapping[str, int] | None = None) -> None:
    """Begin to write the checkpoint of the last finished step; `settle` ends it.

    It waits for a copy of the tensors, and for the write before it no longer than `PATIENCE`: then the copy waits for
    its turn, and is left out if the next one is there before, unless it is the best. Where memory has no room for a
    copy, it waits for the disk. Raises RunError as `settle` does, and TrainingError training-not-finite instead of
    keeping weights that are no numbers.
    """
    setup, now = run.setup, run.now
    if now.step == run.saved_step:
        return
    _require_finite(run)
    if setup.comm.rank:  # all ranks hold the same; one writes it
        run.saved_step = now.step
        return
    state = {
        "source": source or setup.source.state(),
        "hooks": {name: hook.state() for name, hook in run.hooks.items()},
        "rate_scale": now.rate_scale,
        "scaler": now.scaler.state_dict(),
        "skipped": now.skipped,
        "rewinds": run.rewinds,
        "tokens_per_pass": now.plan.tokens_per_pass,
        "stopped": run.stopped,
        "pending": run.pending,
        "random": checkpoint.random_state(setup.plan.device),
    }
    kept = {**now.optimizer.state_dict(), "model": dict(setup.model_state()) if setup.model_state else {}}
    weights, step = trainable(setup.model), now.step
    run.waiting = [one for one in run.waiting if one.step == run.best.step]
    aside = affordable(checkpoint.size_of(weights, kept))
    if aside:
        go_on_writing(run, PATIENCE)
    else:
        settle(run)
    if run.saver.busy:
        text = f"the disk is slower than the steps: the checkpoint of step {step} waits for the one before it"
        setup.sink(Warned(text=f"{text}; save less often, or to a faster disk", data={"step": step}))
    taken = checkpoint.snapshot(step, weights, kept, state, copy=aside)
    run.waiting.append(taken)
    run.saved_step = step
    if aside:
        go_on_writing(run)
    else:
        settle(run)


def settle(run: Run) -> None:
    """Wait until every checkpoint that was begun is written.

    Raises RunError run-no-space or run-damaged when one could not be.
    """
    while run.saver.busy or run.waiting:
        go_on_writing(run, None)


def go_on_writing(run: Run, seconds: float | None = 0.0) -> None:
    """Begin with the checkpoint that waits, if the one before it is written within so many seconds (None: any time).

    Those that are no longer needed are deleted. Raises RunError as `settle` does; what waits is then given up.
    """
    setup = run.setup
    try:
        path = run.saver.wait(seconds)
    except Exception:
        run.waiting.clear()
        raise
    if path is not None:
        checkpoint.prune(setup.checkpoints, setup.trainer.keep_last, () if run.best.step is None else (run.best.step,))
        setup.sink(Saved(path=str(path), step=checkpoint.step_of(path)))
    if run.waiting and not run.saver.busy:
        taken = run.waiting.pop(0)
        run.saver.begin(lambda: checkpoint.save(setup.checkpoints, taken.step, taken))


def resume(run: Run) -> int | None:
    """Go on from the newest whole checkpoint; a damaged one is passed over with a warning. None: a new run."""
    setup = run.setup
    found = _newest(setup) if setup.comm.rank == 0 else None
    step: int | None = setup.comm.share(None if found is None else found.step)
    if step is None:
        if setup.start is not None:
            _put_weights(setup, setup.start(), "the checkpoint to start from")
        if setup.start is not None or "rewind" in (setup.trainer.on_nonfinite, setup.trainer.on_spike):
            save(run)  # something to go back to, from the first step on
        return None
    _put_back(run, found or checkpoint.load(setup.checkpoints, step))
    setup.comm.barrier()  # before anything there changes
    if setup.comm.rank == 0:
        checkpoint.set_aside(setup.checkpoints, newer_than=step)
    setup.sink(Note(text=f"going on from step {step} of {setup.steps}", data={"step": step}))
    return step


def _newest(setup: Setup) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint. Raises RunError when there are some and none is whole."""
    checkpoint.recover(setup.checkpoints)
    steps = checkpoint.steps_in(setup.checkpoints)
    for step in reversed(steps):
        try:
            return checkpoint.load(setup.checkpoints, step)
        except RunError as error:
            if step == steps[0]:
                raise
            setup.sink(Warned(text=f"{error.faults[0].message}; going on from the one before it"))
    return None


def rewind(run: Run, error: TrainingError) -> None:
    """Put an earlier checkpoint back and leave the source where it is: rows taken since are passed over.

    The newest one, or the one before it when the newest was put back already and led here again. Raises ``error`` when
    none is left, or after `MAX_REWINDS`.
    """
    settle(run)
    setup = run.setup
    source, failed = setup.source.state(), run.now.step
    there = checkpoint.steps_in(setup.checkpoints) if setup.comm.rank == 0 else []
    steps = setup.comm.share([step for step in there if step != run.rewound_to])
    if run.rewinds >= MAX_REWINDS or not steps:
        raise error
    found = checkpoint.load(setup.checkpoints, steps[-1])
    setup.comm.barrier()  # before anything there changes
    if setup.comm.rank == 0:
        checkpoint.drop(setup.checkpoints, newer_than=found.step)
    rewinds = run.rewinds + 1
    _put_back(run, found)
    setup.source.restore(source)
    run.rewinds, run.rewound_to = rewinds, found.step
    setup.sink(Rewound(step=found.step, failed=failed, why=error.faults[0].message))


def restore_best(run: Run) -> None:
    """Put the weights of the best evaluation back into the model; damaged ones are named and the last step's stay."""
    settle(run)
    best, setup = run.best.step, run.setup
    setup.comm.barrier()  # it is on the disk now
    if best is None or best == run.now.step:
        return
    try:
        found = checkpoint.load(setup.checkpoints, best)
    except RunError as error:
        setup.sink(Warned(text=f"{error.faults[0].message}; the weights of step {run.now.step} are kept, not the best"))
        return
    _put_weights(setup, found.weights, f"the checkpoint of step {best}")
    metric, value = run.best.metric, run.best.value
    setup.sink(Note(text=f"best checkpoint restored: step {best}, {metric} {value:.4f}", data={"step": best}))


def record_failure(run: Run, step: int, source: Mapping[str, int], error: TrainingError) -> None:
    """Write what is known of the step that failed, so that it can be looked at or repeated.

    ``rows``: numbers of all rows that it took; ``metrics``: the last lines told before it failed, one for each split;
    none where it is the first step of this process.
    """
    if run.setup.comm.rank:
        return
    folder = run.setup.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "step": step,
        "rows": list(run.now.rows),
        "source": dict(source),
        "metrics": [line_of(event) for event in run.told.values()],
        "faults": [fault.to_json() for fault in error.faults],
    }
    atomic.write_json(folder / "failed-step.json", record)


def keep_if_finite(run: Run, source: Mapping[str, int]) -> None:
    """Save the state before a step that failed, if it is sound; ``source``: where the rows stood then."""
    if run.now.step and not _not_finite(run):
        save(run, source)


def _put_back(run: Run, found: checkpoint.Checkpoint) -> None:
    """Everything as it was when the checkpoint was written."""
    setup, state = run.setup, found.state
    _put_weights(setup, found.weights, f"the checkpoint of step {found.step}")
    model = found.optimizer.pop("model", {})
    if setup.restore_model is not None and model:
        setup.restore_model(model)
    run.now.optimizer.zero_grad(set_to_none=True)
    run.now.optimizer.load_state_dict(found.optimizer)
    setup.source.restore(state["source"])
    for name, hook in run.hooks.items():
        if name in state["hooks"]:  # a checkpoint of an earlier version does not know of it
            hook.restore(state["hooks"][name])
    run.now.step = run.saved_step = found.step
    run.now.rate_scale = state["rate_scale"]
    run.now.scaler.load_state_dict(state["scaler"])
    run.now.skipped, run.rewinds = state.get("skipped", 0), state.get("rewinds", 0)
    run.stopped, run.pending = state["stopped"], state.get("pending")
    if run.pending is not None:
        run.saved_step = -1  # another one of this step takes its place
    checkpoint.set_random_state(state["random"], setup.plan.device)


def _put_weights(setup: Setup, found: Mapping[str, torch.Tensor], what: str) -> None:
    mine = trainable(setup.model)
    wrong = sorted(mine.keys() ^ found.keys())
    wrong += sorted(name for name in mine.keys() & found.keys() if mine[name].shape != found[name].shape)
    if wrong:
        raise RunError(
            "run-damaged",
            f"{what} does not fit the model: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}",
            where=str(setup.checkpoints),
            received=", ".join(wrong[:5]),
            allowed="the weights that this run trains, in their shapes",
            fix="choose another --output folder; with --fork, keep base_model, adapter, execution.model as they were",
        )
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(found[name])


def _not_finite(run: Run) -> list[str]:
    return [name for name, weight in trainable(run.setup.model).items() if not bool(weight.isfinite().all())]


def _require_finite(run: Run) -> None:
    wrong = _not_finite(run)
    if wrong:
        raise TrainingError(
            "training-not-finite",
            f"after step {run.now.step} weights are not finite numbers; they are not saved",
            received=f"{len(wrong)} tensors, among them {', '.join(wrong[:3])}",
            fix="set trainer.on_nonfinite: rewind and run again: it goes on from the last checkpoint",
        )
