"""The loss of rows whose answers are known: what training's evaluations measure of validation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from luthier import events
from luthier.data.table import Table
from luthier.infer.answer import is_out_of_memory
from luthier.infer.score import TOKENS_PER_PASS
from luthier.types import Example, Plan

if TYPE_CHECKING:
    from luthier.train.setup import Passes
    from luthier.tuned.tuned import Tuned

MEASURES = ("loss", "perplexity", "token_accuracy")
T = TypeVar("T")


def measures(tuned: Tuned, table: Table, rows: Sequence[int], sink: events.Sink = events.silent) -> dict[str, float]:
    """`MEASURES` of the answers that these rows hold, written as for training; rows without one do not count.

    Empty where no row holds one. Raises ConfigError where the model only answers (vLLM).
    """
    from luthier.train.evaluation import Evaluator

    examples = [one for found in tuned.renderer.outcomes((i, table.row(i)) for i in rows) for one in found.examples]
    if not examples:
        return {}
    model = tuned.model
    values = Evaluator(model=model.module, score=model.score, examples=examples, sink=sink)(_passes_that_fit)
    return {name: values[name] for name in MEASURES if name in values}


def _passes_that_fit(examples: Sequence[Example], run: Callable[[Passes, Plan], T]) -> T:
    """Implements `train.setup.Runner`: out of memory, smaller passes, down to a row each."""
    from luthier.train.memory import give_back
    from luthier.train.passes import in_passes

    room, longest = TOKENS_PER_PASS, max(one.length for one in examples)
    while True:
        plan = Plan(device="", tokens_per_pass=room)
        try:
            return run(in_passes(examples, plan), plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or room <= longest:
                raise
        give_back()
        room //= 2
