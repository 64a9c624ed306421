"""What samples start with in common is computed once, and the gradients are those of micro-steps, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_architectures import load, make

from luthier.config.adapter import Lora
from luthier.data import collate as collating
from luthier.data.collate import collate
from luthier.kernels import attention
from luthier.model.decoder.decoder import Decoder
from luthier.types import Batch, Example

FAMILIES = ("llama", "mistral-window", "gemma2")


def row(number: int, prefix: int, prompt: int, target: int, *, template: int = 0) -> Example:
    """``prefix`` tokens of a template, a prompt of its own, and a target with uneven weights."""
    ids = [(5 * i + 11 * template) % 90 + 3 for i in range(prefix)]
    ids += [(7 * number + 3 * i) % 90 + 3 for i in range(prompt + target)]
    weights = [0.0] * (prefix + prompt) + [1.0 + 0.5 * (i % 2) for i in range(target)]
    return Example(ids, weights, number)


SAME = row(1, 20, 4, 1)
CASES: dict[str, list[Example]] = {
    "a template": [row(i, 18, 1 + i, 2 + i % 3) for i in range(5)],
    "no prompt of their own: several first targets have one source": [row(i, 17, 0, 3) for i in range(4)],
    "two templates among others": [
        row(1, 16, 3, 2), row(2, 20, 2, 2, template=1), row(3, 16, 1, 2), row(4, 0, 5, 4), row(5, 20, 1, 3, template=1)
    ],
    "the same up to the last token": [SAME, replace(SAME, ids=[*SAME.ids[:-1], 50], row=2), replace(SAME, row=3)],
    "one row": [row(1, 18, 2, 3)],
    "a row is the beginning of another": [
        row(1, 18, 0, 4), Example(row(1, 18, 0, 9).ids, [0.0] * 25 + [1.0, 2.0], 2), Example((4,), (1.0,), 3)
    ],
    "trained from the start": [Example(list(range(3, 30)), [1.0] * 27, i) for i in range(3)],
    "trained in the middle of what is common": [
        Example(list(range(3, 40)), [1.0 * (20 <= i < 22 + n) for i in range(37)], n) for n in range(3)
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    where = tmp_path_factory.mktemp(request.param)
    make(where, request.param)
    made = load(where)
    made.adapt(Lora(r=3, dropout=0.0), seed=7)
    generator = torch.Generator().manual_seed(1)
    for pair in made.pairs:
        pair.lora_B.data.normal_(std=0.3, generator=generator)
    return made.train()


def gradients(decoder: Decoder, passes: list[list[Example]], share: bool, **how: object) -> torch.Tensor:
    decoder.execution = replace(type(decoder.execution)(), **how)
    for rows in passes:
        batch = collate(rows, 5, share=share)
        if batch.supervised is None or not len(batch.supervised):
            continue
        weight = batch.target_weight[batch.supervised].double()
        (-(decoder.logprobs(batch) * weight).sum()).backward()
    found = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    decoder.zero_grad()
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("how", [{}, {"recompute_layers": 2}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_micro_steps(decoder: Decoder, case: str, how: dict[str, object]) -> None:
    rows = CASES[case]
    want = gradients(decoder, [[one] for one in rows], share=False)
    assert error(gradients(decoder, [rows], share=True, **how), want) < 1e-10
    assert error(gradients(decoder, [rows[::-1]], share=True, **how), want) < 1e-10


def test_full_training_and_evaluation(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    decoder = load(tmp_path, trained=True)
    rows = CASES["a template"]
    want = gradients(decoder, [[one] for one in rows], share=False)
    assert error(gradients(decoder, [rows], share=True), want) < 1e-10
    with torch.no_grad():
        alone = torch.cat([decoder.score(collate([one]))[0] for one in rows])
        shared = decoder.score(collate(rows, share=True))[0]
    torch.testing.assert_close(shared, alone)


def wrong_positions(batch: Batch) -> Batch:
    """Children start at 0 again."""
    assert batch.parent_segment is not None
    starts = torch.cumsum(torch.tensor(batch.lengths), 0) - torch.tensor(batch.lengths)
    return replace(batch, positions=torch.arange(len(batch.ids)) - starts[batch.segment])


def wrong_parent(batch: Batch) -> Batch:
    """Each child goes on from the other template."""
    assert batch.parent_segment is not None
    first, second = sorted({one for one in batch.parent_segment.tolist() if one >= 0})
    swapped = {-1: -1, first: second, second: first}
    return replace(batch, parent_segment=torch.tensor([swapped[one] for one in batch.parent_segment.tolist()]))


def no_parent(batch: Batch) -> Batch:
    return replace(batch, parent_segment=None)


def wrong_source(batch: Batch) -> Batch:
    """A child's first token is predicted from the token that lies before it in the pass."""
    assert batch.supervised is not None
    return replace(batch, source=batch.supervised - 1)


BROKEN: list[tuple[str, Callable[[Batch], Batch]]] = [
    ("a template", wrong_positions),
    ("two templates among others", wrong_parent),
    ("a template", no_parent),
    ("no prompt of their own: several first targets have one source", wrong_source),
]


@pytest.mark.parametrize(("case", "broken"), BROKEN, ids=lambda one: getattr(one, "__name__", ""))
def test_broken_sharing_is_noticed(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, case: str, broken: Callable[[Batch], Batch]
) -> None:
    rows = CASES[case]
    want = gradients(decoder, [[one] for one in rows], share=False)
    made = collating.collate
    monkeypatch.setitem(globals(), "collate", lambda *args, **options: broken(made(*args, **options)))
    assert error(gradients(decoder, [rows], share=True), want) > 1e-3


def test_a_forgotten_gradient_is_noticed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = CASES["a template"]
    want = gradients(decoder, [[one] for one in rows], share=False)
    made = attention.spans
    monkeypatch.setattr(attention, "spans", lambda *args: replace(made(*args), copies=()))
    assert error(gradients(decoder, [rows], share=True), want) > 1e-3
