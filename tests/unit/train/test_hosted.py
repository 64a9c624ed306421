"""State that waits on the host: the same update to the bit, in pieces, and across a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.config.optimizer import Optimizer as Declared
from luthier.train import hosted
from luthier.train.optimizer import build_optimizer, make_state

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1}, "adam": {"amsgrad": True}, "sgd": {"momentum": 0.9}, "lion": {}, "adafactor": {},
}  # fmt: skip

EIGHT_BIT = ("adamw_8bit", "lion_8bit", "paged_adamw", "paged_adamw_8bit")


def weights(device: str = "cpu") -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"a": (40, 30), "b": (30,), "c": (64, 8), "unused": (5, 5), "d": (3, 3)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for name, shape in shapes.items()}


def made(named: dict[str, torch.nn.Parameter], kind: str, on_host: bool) -> torch.optim.Optimizer:
    device = str(named["a"].device)
    optimizer = build_optimizer(named.items(), Declared(type=kind, **KINDS[kind]), 0.01, device)
    if on_host:
        hosted.keep_on_host(optimizer)
    return optimizer


def run(named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        draw = torch.Generator().manual_seed(number)
        for name, weight in named.items():
            weight.grad = None if name == "unused" else torch.randn(weight.shape, generator=draw).to(weight.device)
        optimizer.step()
        assert all((weight.grad is None) == (name == "unused") for name, weight in named.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 6000, 2**30])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_update_is_the_same_to_the_bit(kind: str, piece: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "UPDATED", piece)
    there, here = weights(device), weights(device)
    plain, away = made(there, kind, False), made(here, kind, True)
    run(there, plain, range(3))
    run(here, away, range(3))
    assert all(torch.equal(there[name], here[name]) for name in there)

    again = weights(device)
    for name, weight in again.items():
        weight.data = here[name].detach().clone()
    resumed = made(again, kind, True)
    resumed.load_state_dict(away.state_dict())
    run(there, plain, range(3, 6))
    run(again, resumed, range(3, 6))
    assert all(torch.equal(there[name], again[name]) for name in there)
    kept = resumed.state_dict()["state"]
    places = {value.device.type for state in kept.values() for value in state.values() if getattr(value, "ndim", 0)}
    assert places == {"cpu"}
    assert kept.keys() == plain.state_dict()["state"].keys()


def test_state_is_away_between_steps_and_few_of_it_here_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "UPDATED", 1)
    here: list[int] = []
    come, go = hosted._come, hosted._go
    monkeypatch.setattr(hosted, "_come", lambda state, weight: (here.append(1), come(state, weight)))
    monkeypatch.setattr(hosted, "_go", lambda state, weight, homes: (here.append(-1), go(state, weight, homes)))
    named = weights()
    optimizer = made(named, "adamw", True)
    run(named, optimizer, range(1))
    homes = {value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.ndim}
    run(named, optimizer, range(1, 2))
    assert homes == {value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.ndim}
    total = 0
    for change in here:
        total += change
        assert total in (0, 1), "one weight's state at a time"
    assert here.count(1) == 8


@pytest.mark.parametrize("kind", [*KINDS, "sgd without", *(pytest.param(k, marks=pytest.mark.gpu) for k in EIGHT_BIT)])
def test_state_that_is_made_ahead_changes_no_update(kind: str) -> None:
    """Not by a bit; that of a weight which has no gradient yet counts from its first update."""
    device = "cuda" if kind in EIGHT_BIT else "cpu"
    plain, ahead = weights(device), weights(device)
    options = {"type": kind.split()[0], "weight_decay": 0.1} | KINDS.get(kind, {})
    one, other = (build_optimizer(it.items(), Declared(**options), 0.01, device) for it in (plain, ahead))
    before = {name: weight.detach().clone() for name, weight in ahead.items()}
    make_state(other)
    assert all(torch.equal(before[name], ahead[name]) and ahead[name].grad is None for name in ahead)
    assert kind == "sgd without" or set(other.state) == set(ahead.values())
    run(plain, one, range(3))
    run(ahead, other, range(3))
    for named in (plain, ahead):
        named["unused"].grad = torch.ones_like(named["unused"])
    one.step()
    other.step()
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)
