"""From prepared work to a trained model in its run folder: open, fit, save."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from luthier import events
from luthier.data.columns import reference_of
from luthier.parallel import in_turn
from luthier.pipeline.beginning import first_rows, kept_start
from luthier.pipeline.forking import Origin, weights_of
from luthier.pipeline.opening import open_base, open_for_tuning
from luthier.pipeline.preparing import Work
from luthier.plan.recorded import leaner, more_room
from luthier.run import RunFolder, atomic, manifest, not_writable, require_space
from luthier.run.watch import growing
from luthier.tuned import TrainedOn, Tuned

if TYPE_CHECKING:
    from luthier.model.tunable import Tunable
    from luthier.train.comm import Comm
    from luthier.train.evaluation import Evaluator
    from luthier.train.precision import Precision

BYTES_PER_TRAINED_WEIGHT = 4 * 3  # a checkpoint: fp32 weight and two moments


def fit_and_save(
    work: Work, folder: RunFolder, precision: Precision, comm: Comm, sink: events.Sink, origin: Origin | None
) -> Tuned:
    """Open the model, train it, save what was trained."""
    from luthier.train.trackers import tracking

    if comm.rank != 0:
        return _fit_and_save(work, folder, precision, comm, sink, events.silent, origin)
    names, name = work.config.trainer.track, folder.path.name
    with tracking(names, folder.path, name, work.config.to_dict(), sink) as trackers:  # told before the work begins
        heard = events.fan_out(sink, _Keeper(folder), *trackers)
        return _fit_and_save(work, folder, precision, comm, sink, heard, origin)


def _fit_and_save(
    work: Work,
    folder: RunFolder,
    precision: Precision,
    comm: Comm,
    sink: events.Sink,
    heard: events.Sink,
    origin: Origin | None,
) -> Tuned:
    """The work itself; ``heard`` is told what the loop does, ``sink`` all else."""
    from luthier.objectives.sft import Sft
    from luthier.train.loop import fit, trainable
    from luthier.train.memory import give_back
    from luthier.train.setup import Setup

    settings, plan, trainer = work.config, work.plan, work.config.trainer
    first = comm.rank == 0
    source = work.source()
    steps = work.steps
    kept = kept_start(settings, folder, origin, first=first)
    with in_turn(comm) if kept is not None else nullcontext():  # one rank makes the start of all
        rows = first_rows(settings, work.source())
        model = open_for_tuning(settings, work.base, precision, plan, sink, steps=steps, rows=rows, kept=kept)
    trained = sum(weight.numel() for weight in trainable(model.module).values())
    require_space(folder.path, trained * BYTES_PER_TRAINED_WEIGHT * (trainer.keep_last + 2))
    open_it = partial(open_base, settings, work.base, precision, plan.device, sink)
    data = partial(TrainedOn, work.table, work.splits)
    tuned = Tuned(settings, work.tokenizer, work.layout, work.renderer, model, folder.path.absolute(), data, open_it)
    evaluate, evaluate_train = _evaluators(work, tuned, sink)
    setup = Setup(
        model=model.module,
        logprobs=model.logprobs,
        objective=Sft(trainer.loss_normalization),
        source=source,
        plan=plan,
        trainer=trainer,
        checkpoints=folder.checkpoints,
        total_steps=steps,
        evaluate=evaluate,
        evaluate_train=evaluate_train,
        save_adapter=partial(_save, model, folder, trained * (4 if settings.adapter else 2), sink) if first else None,
        penalty=model.penalty,
        after_update=model.after_update,
        model_state=model.state,
        restore_model=model.restore,
        precision=precision,
        seed=settings.random_seed,
        sink=heard,
        comm=comm,
        loraplus_lr_ratio=getattr(settings.adapter, "loraplus_lr_ratio", None),
        leaner=partial(leaner, layers=work.base.spec.layers),
        more_room=partial(more_room, config=settings, spec=work.base.spec),
        adopt=model.adopt,
        start=partial(weights_of, origin, work.base.content_hash) if origin is not None else None,
        resume_hint=f"luthier train --resume {folder.path}",
    )
    with events.stage(sink, "train", f"{setup.steps} steps, {trained:,} of the weights, {precision}"):
        outcome = fit(setup)
    if first:
        atomic.write_json(folder.path / "outcome.json", outcome.to_json())
    model.module.eval()
    give_back()
    return tuned


def _evaluators(work: Work, tuned: Tuned, sink: events.Sink) -> tuple[Evaluator | None, Evaluator | None]:
    """What scores the model during training: on validation rows, and on the training rows where that is asked for."""
    from luthier.train.evaluation import Evaluator

    trainer, examples, model = work.config.trainer, work.prepared.examples, tuned.model
    answered = (row for row in work.prepared.rows["validation"] if reference_of(work.table.row(row), work.layout))
    shown = list(islice(answered, trainer.eval_generation_rows))
    generated = partial(_generated_scores, tuned, shown, sink, set()) if shown else None
    over = partial(Evaluator, model=model.module, score=model.score, max_rows=trainer.max_eval_rows, sink=sink)
    return (
        over(examples=examples["validation"], generated=generated) if examples["validation"] else None,
        over(examples=examples["train"]) if trainer.evaluate_training_set else None,
    )


def _save(model: Tunable, folder: RunFolder, size: int, sink: events.Sink) -> Path:
    """Write what was trained, about ``size`` bytes, whole or not at all; the disk tells how far it is.

    Raises RunError run-no-space.
    """
    staging = folder.path / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        with growing(sink, "save", folder.path, size):
            made = model.save(staging)
        manifest.write(made)
        for one in made.iterdir():
            atomic.sync_file(one)
        atomic.sync_folder(made)
        final = folder.path / made.name
        if final.exists():  # of an attempt that ended before the run was finished
            final.rename(staging / "before")
        made.rename(final)
        atomic.sync_folder(folder.path)
    except Exception as error:
        if atomic.is_full(error):
            raise not_writable(folder.path, error) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


@dataclass(frozen=True)
class _Keeper:
    """A sink that appends to the run's record what training was forced to do: another plan, a way back."""

    folder: RunFolder

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Planned) and event.why:
            self.folder.append_plan(event.plan, event.why)
        if isinstance(event, events.Rewound):
            self.folder.append_rewind(event.step, event.failed, event.why)


def _generated_scores(tuned: Tuned, rows: Sequence[int], sink: events.Sink, told: set[str]) -> Mapping[str, float]:
    """Metrics of answers generated for a few validation rows. What was ``told`` of rows without one is not again."""
    assert tuned.table is not None
    answered = tuned.answer(tuned.table, rows)
    if answered.unasked and answered.unasked not in told:
        told.add(answered.unasked)
        sink(events.Warned(text=f"validation: {answered.unasked}; they count as wrong"))
    return answered.scores()
