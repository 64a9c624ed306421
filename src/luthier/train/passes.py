"""Examples go through the model in the passes of the plan in force; out of memory, a leaner plan takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from luthier.data.pack import schedule
from luthier.data.share import shared_by_all
from luthier.errors import TrainingError
from luthier.events import Planned
from luthier.infer.answer import is_out_of_memory
from luthier.model.dropout import drawn_by_pass
from luthier.train.comm import Comm, OneRank
from luthier.train.memory import give_back
from luthier.train.setup import Passes, Runner, Setup
from luthier.train.state import Training
from luthier.types import Example, Plan

T = TypeVar("T")
ONE = OneRank()


def in_passes(examples: Sequence[Example], plan: Plan, comm: Comm = ONE) -> Passes:
    """This rank's passes of the examples as ``plan`` cuts them; some may be empty."""
    shared = shared_by_all(examples) if plan.share_prefix else 0
    cut = schedule([example.length for example in examples], plan, comm.world, shared=shared)[comm.rank]
    return [[examples[index] for index in indices] for indices in cut]


def planned(plan: Plan) -> Runner:
    """The runner of a plan that stays as it is."""
    return lambda examples, run: run(in_passes(examples, plan), plan)


def passes_that_fit(
    setup: Setup,
    now: Training,
    moment: str,
    examples: Sequence[Example],
    run: Callable[[Passes, Plan], T],
    comm: Comm = ONE,
) -> T:
    """What ``run`` returns; out of memory, a leaner plan is put in force and all of the passes run again.

    ``moment`` says in words what is being done. ``run`` changes nothing but gradients, which are dropped before it is
    called again. All ranks of ``comm`` begin again when one of them has to. Raises TrainingError training-no-memory
    when nothing leaner is left.
    """
    while True:
        done, full = False, ""
        try:
            result = run(in_passes(examples, now.plan, comm), now.plan)
            done = True
        except (RuntimeError, MemoryError) as error:  # its text alone: the frames behind it hold what has to go
            if not is_out_of_memory(error):
                raise
            full = first_line(error)
        if not comm.any(not done):
            return result
        now.optimizer.zero_grad(set_to_none=True)
        longest = max(examples, key=lambda example: example.length)
        leaner = setup.leaner(now.plan, longest.length)
        if leaner is None:
            raise TrainingError(
                "training-no-memory",
                f"out of memory in {moment} with one sample a pass",
                where=f"row {longest.row}, {longest.length} tokens",
                received=full or "another process of the run has no memory left",
                fix=_fix(setup, now.plan),
            )
        put_in_force(setup, now, leaner)
        others = "; dropout draws other masks from here on" if drawn_by_pass(setup.model) else ""
        setup.sink(Planned(plan=asdict(leaner), why=f"out of memory in {moment}{others}"))


def _fix(setup: Setup, plan: Plan) -> str:
    """What helps where no plan is left that could be put in force: what loses nothing first."""
    room = " ".join(f"--set {key}" for key in setup.more_room(plan))
    new = f"{setup.resume_hint} {room} (plans anew, with less on the device); or " if room else ""
    return (
        f"{new}end other programs, then {setup.resume_hint}; or train anew with a lower "
        "preprocessing.max_sequence_length, which changes what is learned"
    )


def first_line(error: BaseException) -> str:
    """What an error says, in a line that is never empty."""
    return str(error).split("\n")[0] or type(error).__name__


def put_in_force(setup: Setup, now: Training, plan: Plan) -> None:
    """Execute ``plan`` from the next pass on, with the memory that the one before it held."""
    setup.adopt(plan)
    now.plan = plan
    give_back()
    torch.cuda.empty_cache()
