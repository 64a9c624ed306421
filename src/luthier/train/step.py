"""One optimizer step, in the order it happens. "Pass": one forward and backward over one pack of samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from luthier.data.collate import collate
from luthier.errors import TrainingError
from luthier.events import Planned, Warned
from luthier.infer.answer import is_out_of_memory
from luthier.model.dropout import drawn_by_pass
from luthier.plan.recorded import state_on_host
from luthier.train.hosted import keep_on_host
from luthier.train.memory import peak_gib
from luthier.train.optimizer import make_state
from luthier.train.passes import first_line, passes_that_fit, put_in_force
from luthier.train.setup import Passes, Setup
from luthier.train.state import Training
from luthier.types import Plan

MAX_SKIPPED = 20  # updates skipped in a row, before neither the loss scale nor a few rows are to blame any more


@dataclass(frozen=True, slots=True)
class StepResult:
    """One finished step. ``loss`` is the objective's value; ``values`` go to metrics.jsonl."""

    loss: float
    values: Mapping[str, float]


def make_state_that_fits(setup: Setup, now: Training) -> None:
    """Make what the optimizer remembers before the first pass; on the host, where the device has no room for it.

    Raises TrainingError training-no-memory.
    """
    while True:
        full = ""
        try:
            make_state(now.optimizer)
        except (RuntimeError, MemoryError) as error:  # its text alone: the frames behind it hold what has to go
            if not is_out_of_memory(error):
                raise
            full = first_line(error)
        if not setup.comm.any(bool(full)):
            return
        leaner = state_on_host(now.plan, setup.trainer.optimizer)
        if leaner is None:
            raise _no_memory(setup, now, "for what the optimizer remembers, before the first step", full)
        now.optimizer.state.clear()
        keep_on_host(now.optimizer)
        put_in_force(setup, now, leaner)
        setup.sink(Planned(plan=asdict(leaner), why="out of memory for what the optimizer remembers"))


def train_step(setup: Setup, now: Training, rate_factor: float) -> StepResult:
    """Fetch, weigh, run the passes, clip, check, update. Reads from the device once, to check and to log.

    Raises TrainingError: training-not-finite before anything is updated, training-no-memory when no leaner plan helps.
    """
    started = time.perf_counter()
    step = setup.source.next_step()
    now.rows = tuple(sorted({example.row for example in step}))
    constants = setup.objective.prepare(step)  # global weights, before any backward

    def run(passes: Passes, plan: Plan) -> tuple[dict[str, torch.Tensor], int]:
        return _run_passes(setup, now, passes, constants), len(passes)

    totals, passes = passes_that_fit(setup, now, f"step {now.step + 1}", step, run, setup.comm)
    setup.comm.sum_gradients([weight for group in now.optimizer.param_groups for weight in group["params"]])
    now.scaler.unscale_(now.optimizer)
    norm = _clip(setup, now.optimizer)

    sums = setup.comm.sum(torch.stack([totals[name] for name in ("loss", "tokens", "computed")]))
    loss, tokens, computed, gradient = torch.cat([sums, norm[None]]).tolist()  # the one host read
    finite = _check_finite(setup, now, loss, gradient)

    for group in now.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor * now.rate_scale
    if finite:
        _update(setup, now)
    now.scaler.update()  # in fp16 a gradient that was not finite lowers the scale
    now.step += 1
    if finite and setup.after_update is not None:
        setup.after_update(now.step)
    now.optimizer.zero_grad(set_to_none=True)

    if not now.told:
        now.told = True
        _tell_of_dropout(setup)

    seconds = time.perf_counter() - started
    every = sum(example.length for example in step)
    values = {
        "learning_rate": setup.rate * rate_factor * now.rate_scale,
        "tokens_per_s": every / seconds,
        "supervised_tokens": int(tokens),
        "tokens": every,
        "tokens_computed": int(computed),
        "memory_gib": round(peak_gib(setup.plan.device), 4),
        "gradient_norm": gradient,
        "passes": passes,
        "rows": len(step),
    }
    return StepResult(loss, values if finite else {**values, "skipped": 1})


def _tell_of_dropout(setup: Setup) -> None:
    """After a step: whether tokens can be told apart where an adapter drops is seen in its first pass."""
    if names := drawn_by_pass(setup.model):
        shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        text = f"dropout that is of no sample and position ({shown}) draws other masks where a step is cut otherwise, "
        setup.sink(Warned(text=f"{text}on another number of ranks too; set it to 0 to rule that out"))


def _update(setup: Setup, now: Training) -> None:
    """Let the optimizer step. Raises TrainingError training-no-memory."""
    now.torn = True
    try:
        now.scaler.step(now.optimizer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = f"in the update of step {now.step + 1}, where no smaller pass helps; checkpoints are whole"
        raise _no_memory(setup, now, where, first_line(error)) from error
    now.torn = False


def _no_memory(setup: Setup, now: Training, where: str, received: str) -> TrainingError:
    away = state_on_host(now.plan, setup.trainer.optimizer) is not None
    return TrainingError(
        "training-no-memory",
        f"out of memory {where}",
        received=received or "another process of the run has no memory left",
        fix=f"{'set execution.optimizer: host' if away else 'end other programs'}; to go on: {setup.resume_hint}",
    )


def _run_passes(setup: Setup, now: Training, passes: Passes, constants: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Forward and backward over each pass; on the device, the sums of the loss and of statistics.

    ``tokens``: supervised ones; ``computed``: all that passes held, what samples share once.
    """
    device = now.plan.device
    totals = {name: torch.zeros((), device=device) for name in ("loss", "tokens", "computed")}
    for number, examples in enumerate(passes):
        if not examples:
            continue
        # What is drawn over a pass depends on (seed, step, pass) alone: neither a resume nor an evaluation changes it.
        place = number * setup.comm.world + setup.comm.rank
        torch.manual_seed((setup.seed * 1_000_003 + now.step) * 1_009 + place)
        batch = collate(examples, now.step, share=now.plan.share_prefix)
        logprobs = setup.logprobs(batch)  # it moves what it needs itself: shapes are known on the host alone
        made = setup.objective.loss(logprobs, batch, constants)
        loss = torch.stack(
            [term.coefficient * term.sum / constants[name] for name, term in made.terms.items()]  # divided here, once
        ).sum()
        now.scaler.scale(loss).backward()
        totals["computed"] += len(batch.ids)
        totals["loss"] += loss.detach()
        totals["tokens"] += made.statistics.get("tokens", 0.0)
    penalty = setup.penalty() if setup.penalty is not None else None
    if penalty is not None:  # not part of the loss that is told: training's and validation's stay comparable
        now.scaler.scale(penalty / setup.comm.world).backward()
    return totals


def _clip(setup: Setup, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Bound the gradient as declared; returns its norm before that, on the device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    clipping = setup.trainer.gradient_clipping
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
    if clipping.clipglobalnorm is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, clipping.clipglobalnorm, norm)
    if clipping.clipnorm is not None:
        for weight in weights:
            torch.nn.utils.clip_grad_norm_([weight], clipping.clipnorm)
    if clipping.clipvalue is not None:
        torch.nn.utils.clip_grad_value_(weights, clipping.clipvalue)
    return norm.to(setup.plan.device)


def _check_finite(setup: Setup, now: Training, loss: float, norm: float) -> bool:
    """True when the update can be made, False when it shall be skipped; raises TrainingError otherwise."""
    finite = all(value - value == 0 for value in (loss, norm))
    if finite:
        now.skipped = 0
        return True
    now.skipped += 1
    overflow = now.scaler.is_enabled() and loss - loss == 0  # no fault: the loss scale is still finding its height
    if overflow and now.skipped <= MAX_SKIPPED:
        return False
    shown = f"{', '.join(map(str, now.rows[:16]))}{' …' if len(now.rows) > 16 else ''}"
    if setup.trainer.on_nonfinite == "skip_step" and now.skipped <= MAX_SKIPPED:
        text = f"step {now.step + 1} is not finite (loss {loss}, gradient norm {norm}): no update with its rows"
        setup.sink(Warned(text=f"{text} {shown}", data={"step": now.step + 1, "rows": list(now.rows)}))
        return False
    named = [
        name
        for name, weight in setup.model.named_parameters()
        if weight.grad is not None and not bool(weight.grad.isfinite().all())
    ]
    now.optimizer.zero_grad(set_to_none=True)
    raise TrainingError(
        "training-not-finite",
        f"step {now.step + 1} has a {'loss' if loss - loss != 0 else 'gradient'} that is not a finite number; "
        "no weight was updated with it",
        where=f"rows {shown}",
        received=f"loss {loss}, gradient norm {norm}; gradients not finite: {', '.join(named[:3]) or 'none'}",
        fix="set trainer.on_nonfinite: skip_step (or rewind) and run again; or lower trainer.learning_rate, or set "
        "trainer.precision: fp32, and train into a new folder",
    )
