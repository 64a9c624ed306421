"""How probable a model finds given answers: the probability of what it wrote, or of each class it may choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.data.share import cut
from luthier.events import Sink, progress, silent
from luthier.infer.answer import is_out_of_memory
from luthier.model.tunable import Tunable
from luthier.types import Example, Plan

TOKENS_PER_PASS = 4096


def logprobs_of(
    model: Tunable, examples: Sequence[Example], *, tokens_per_pass: int = TOKENS_PER_PASS, sink: Sink = silent
) -> list[list[float]]:
    """For each example, the log-probability of every supervised token, in order. The training mode is put back.

    Out of memory, a pass is made again in halves; an example that does not fit by itself has none.
    """
    found: list[list[float]] = [[] for _ in examples]
    module = model.module
    training = [one for one in module.modules() if one.training]
    passes = _passes(model, examples, tokens_per_pass)
    module.eval()
    try:
        with torch.no_grad():
            for indices in progress(sink, "score", passes, unit="passes"):
                for index, value in _read(model, examples, indices):
                    found[index].append(value)
    finally:
        for one in training:
            one.training = True
    return found


def choice_scores(
    model: Tunable,
    prompts: Sequence[Sequence[int]],
    endings: Sequence[Sequence[int]],
    *,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """(index of a prompt, the log-probability of each ending after it), as passes are done, longest prompts first.

    A model that shares beginnings reads a prompt once, whatever the number of endings. A prompt that does not fit into
    memory by itself has no log-probabilities.
    """
    added = sum(map(len, endings))
    block: list[int] = []
    tokens = 0
    for at in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        size = added + len(prompts[at]) * (1 if model.shares else len(endings))
        if block and tokens + size > tokens_per_pass:
            yield from _scored(model, block, prompts, endings, tokens_per_pass)
            block, tokens = [], 0
        block.append(at)
        tokens += size
    if block:
        yield from _scored(model, block, prompts, endings, tokens_per_pass)


def _scored(
    model: Tunable,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    endings: Sequence[Sequence[int]],
    tokens_per_pass: int,
) -> Iterator[tuple[int, tuple[float, ...]]]:
    examples = [
        Example([*prompts[row], *ids], [0.0] * len(prompts[row]) + [1.0] * len(ids), row)
        for row in rows
        for ids in endings
    ]
    found = logprobs_of(model, examples, tokens_per_pass=tokens_per_pass)
    for at, row in enumerate(rows):
        own = found[at * len(endings) : (at + 1) * len(endings)]
        yield row, tuple(map(sum, own)) if all(own) else ()


def _read(model: Tunable, examples: Sequence[Example], indices: Sequence[int]) -> list[tuple[int, float]]:
    """(example, log-probability) of the supervised tokens of one pass; out of memory, of its halves, one by one."""
    try:
        return _pass(model, examples, indices)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(indices) == 1:
        return []
    middle = len(indices) // 2
    return _read(model, examples, indices[:middle]) + _read(model, examples, indices[middle:])


def _pass(model: Tunable, examples: Sequence[Example], indices: Sequence[int]) -> list[tuple[int, float]]:
    own = [examples[i] for i in indices]
    batch = collate(own, share=model.shares)  # the model moves what it needs
    segments = batch.segment[batch.target_weight != 0].tolist()
    pieces = cut(own) if model.shares else None
    return [
        (indices[segment if pieces is None else pieces[segment].example], value)
        for segment, value in zip(segments, model.logprobs(batch).tolist(), strict=True)
    ]


def _passes(model: Tunable, examples: Sequence[Example], room: int) -> list[list[int]]:
    """Which examples share a pass. Neighbours of one row count what differs alone, where beginnings are shared."""
    if not model.shares:
        return schedule([example.length for example in examples], Plan(device="", tokens_per_pass=room))[0]
    passes: list[list[int]] = []
    used = 0
    for at, example in enumerate(examples):
        size = example.length
        if passes and examples[passes[-1][-1]].row == example.row:
            size = example.supervised
        if not passes or used + size > room:
            passes.append([])
            used, size = 0, example.length
        passes[-1].append(at)
        used += size
    return passes
