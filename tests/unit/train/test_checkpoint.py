"""Checkpoints on disk: whole or not there, every changed byte found, written beside the steps, without litter."""

from __future__ import annotations

import random
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.errors import RunError
from luthier.events import Saved, Stepped, Warned
from luthier.train import checkpoint, keeping, saver, tensorfile
from luthier.train.loop import fit


def write(folder: Path, step: int = 3, size: int = 1000) -> Path:
    weights = {"w": torch.arange(float(size))}
    kept = {"state": {0: {"step": torch.tensor(1.0), "m": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    taken = checkpoint.snapshot(step, weights, kept, {"hooks": {}, "source": {"epoch": 0}})
    return checkpoint.save(folder, step, taken)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    found = checkpoint.load(tmp_path, 3)
    assert torch.equal(found.weights["w"], torch.arange(1000.0))
    assert found.optimizer["param_groups"][0]["betas"] == (0.9, 0.99)
    assert torch.equal(found.optimizer["state"][0]["m"], torch.ones(3))


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    whole = {
        str(dtype): torch.randint(0, 2, (3, 5, 2), generator=drawn).to(dtype) for dtype in tensorfile.NAMES
    } | {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 4), "名": torch.arange(3)}  # fmt: skip
    tensorfile.write(tmp_path / "a.safetensors", whole)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", ["flip", "zero", "truncate"])
def test_each_damaged_place_is_found_and_its_file_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path)
    draw = random.Random(kind)
    files = sorted(path.iterdir())
    whole = {one: one.read_bytes() for one in files}
    for _ in range(40):
        victim = draw.choice(files)
        content = bytearray(whole[victim])
        at = draw.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "zero":
            content[at : at + 16] = bytes(len(content[at : at + 16]))
        else:
            del content[at:]
        if bytes(content) == whole[victim]:  # a run of zeros over zeros changes nothing
            continue
        victim.write_bytes(bytes(content))
        with pytest.raises(RunError) as caught:
            checkpoint.load(tmp_path, 3)
        assert caught.value.code == "run-damaged"
        if victim.name != "manifest.json":
            assert victim.name in str(caught.value)
        victim.write_bytes(whole[victim])
    checkpoint.load(tmp_path, 3)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "step-000009")
    with pytest.raises(RunError, match="checkpoint of step 3"):
        checkpoint.load(tmp_path, 9)


def test_one_that_is_replaced_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, the run finds the old one again; afterwards nothing of it is left."""
    write(tmp_path, size=10)
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.startswith(".staging-3"):
            raise SystemExit(9)  # as a kill: no clean-up of `save` runs for it
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(SystemExit):
        write(tmp_path, size=20)
    monkeypatch.undo()
    assert checkpoint.steps_in(tmp_path) == []
    checkpoint.recover(tmp_path)
    assert len(checkpoint.load(tmp_path, 3).weights["w"]) == 10
    write(tmp_path, size=20)
    assert len(checkpoint.load(tmp_path, 3).weights["w"]) == 20
    assert [one.name for one in tmp_path.iterdir()] == ["step-000003"]


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """As a full disk does, wherever in the checkpoint it happens."""
    first = write(tmp_path, 1)
    most = max(one.stat().st_size for one in first.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, most // 2, most - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(RunError) as caught:
                write(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.code == "run-no-space", caught.value
        assert [one.name for one in tmp_path.iterdir()] == ["step-000001"]
    checkpoint.load(tmp_path, 1)
    write(tmp_path, 2)


def test_steps_go_on_while_a_checkpoint_is_written(make_setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of step 2 ends only after step 4 was told of; what it holds is step 2 all the same."""
    may, held, order = threading.Event(), [], []
    real = checkpoint.save

    def slow(folder, step, taken):
        if step == 2:
            held.append(may.wait(30))
        order.append(f"written {step}")
        return real(folder, step, taken)

    def sink(event) -> None:
        if isinstance(event, Stepped) and event.split == "train":
            order.append(f"step {event.step}")
            if event.step == 4:
                may.set()
        if isinstance(event, Saved):
            assert threading.current_thread() is threading.main_thread()

    monkeypatch.setattr(keeping.checkpoint, "save", slow)
    options = {"epochs": 2, "steps_per_checkpoint": 2, "keep_last": 9}
    setup = make_setup(trainer=options, sink=sink, evaluate=None)
    fit(setup)
    assert held == [True] and order.index("step 4") < order.index("written 2") < order.index("written 4")
    other = make_setup(trainer={**options, "train_steps": 2}, evaluate=None, checkpoints=setup.checkpoints / "b")
    other = replace(other, total_steps=6)
    monkeypatch.setattr(keeping.checkpoint, "save", real)
    fit(other)
    for step in (2, 4, 6):
        left, right = checkpoint.load(setup.checkpoints, step), checkpoint.load(other.checkpoints, step)
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)
        assert left.state == right.state


@pytest.fixture
def slow_disk(make_setup, monkeypatch: pytest.MonkeyPatch):
    """A setup whose first write ends only when the step ``until`` is told of, and what it tells, in order."""

    def make(until: int, fail: bool = False, **changes):
        may, events, begun, real = threading.Event(), [], [], checkpoint.save

        def slow(folder, step, taken):
            begun.append(step)
            if begun == [2]:
                assert may.wait(8), "the steps have waited for the disk"
                if fail:
                    raise RunError("run-no-space", "no room")
            return real(folder, step, taken)

        def sink(event) -> None:
            events.append(event)
            if isinstance(event, Stepped) and event.split == "train" and event.step == until:
                may.set()
                monkeypatch.setattr(keeping, "PATIENCE", 30.0)  # a fast disk again
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()

        monkeypatch.setattr(keeping.checkpoint, "save", slow)
        monkeypatch.setattr(keeping, "PATIENCE", 0.01)
        options = {"epochs": 4, "steps_per_checkpoint": 2, "keep_last": 9}
        return make_setup(trainer=options, sink=sink, **{"evaluate": None, **changes}), events

    return make


def test_a_slow_disk_holds_no_step_up_and_the_newest_waits_for_it(slow_disk, make_setup, monkeypatch) -> None:
    setup, events = slow_disk(until=9)
    fit(setup)
    assert checkpoint.steps_in(setup.checkpoints) == [2, 8, 10, 12]  # 4 and 6 were no longer the newest
    told = [event.data["step"] for event in events if isinstance(event, Warned) and "slower" in event.text]
    assert told == [4, 6, 8]
    saved = [event.step for event in events if isinstance(event, (Saved, Stepped))]
    assert saved[:11] == [*range(1, 10), 2, 10]  # written beside steps 3 to 9, and told of after them
    monkeypatch.undo()
    monkeypatch.setattr(keeping, "affordable", lambda size: False)  # each is written before the next step
    other = make_setup(trainer={"epochs": 4, "steps_per_checkpoint": 2, "keep_last": 9}, evaluate=None,
                       checkpoints=setup.checkpoints / "b")  # fmt: skip
    fit(other)
    for step in (8, 10, 12):  # each is of its own step, though others were taken before it was written
        left, right = checkpoint.load(setup.checkpoints, step), checkpoint.load(other.checkpoints, step)
        assert left.state == right.state
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)


def test_a_slow_disk_gets_the_best_however_long_it_takes(slow_disk) -> None:
    values = iter([2.0, 1.0, 3.0, 3.0])
    setup, events = slow_disk(until=11, evaluate=lambda _: {"loss": next(values)})
    assert fit(setup).best_step == 6
    assert checkpoint.steps_in(setup.checkpoints) == [2, 6, 12]
    assert not [event for event in events if isinstance(event, Warned) and "slower" not in event.text]
    best = checkpoint.load(setup.checkpoints, 6).weights
    assert all(torch.equal(weight, best[name]) for name, weight in keeping.trainable(setup.model).items())


def test_a_slow_disk_that_is_full_ends_the_run_and_nothing_more_is_begun(slow_disk) -> None:
    setup, events = slow_disk(until=9, fail=True)
    with pytest.raises(RunError, match="no room"):
        fit(setup)
    assert checkpoint.steps_in(setup.checkpoints) == [] and not any(isinstance(event, Saved) for event in events)


def test_without_memory_for_a_copy_the_step_waits(make_setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "affordable", lambda size: False)
    order = []
    setup = make_setup(
        trainer={"epochs": 1, "steps_per_checkpoint": 1}, evaluate=None,
        sink=lambda e: order.append((type(e).__name__, e.step)) if isinstance(e, (Saved, Stepped)) else None,
    )  # fmt: skip
    fit(setup)
    assert order == [(kind, step) for step in (1, 2, 3) for kind in ("Stepped", "Saved")]
    assert saver.affordable(1) and not saver.affordable(2**60)


def test_a_write_that_fails_ends_the_run_and_leaves_the_one_before(make_setup, monkeypatch) -> None:
    real = checkpoint.save

    def full(folder, step, taken):
        if step >= 4:
            raise RunError("run-no-space", "the checkpoint of step 4 could not be written: no room")
        return real(folder, step, taken)

    monkeypatch.setattr(keeping.checkpoint, "save", full)
    options = {"epochs": 4, "steps_per_checkpoint": 2}
    setup = make_setup(trainer=options, evaluate=None)
    with pytest.raises(RunError) as caught:
        fit(setup)
    assert caught.value.code == "run-no-space" and checkpoint.steps_in(setup.checkpoints) == [2]
    monkeypatch.setattr(keeping.checkpoint, "save", real)
    assert fit(make_setup(trainer=options, evaluate=None)).resumed_from == 2


def test_a_failure_waits_for_the_checkpoint_under_way(make_setup, monkeypatch) -> None:
    real = checkpoint.save

    def slow(folder, step, taken):
        time.sleep(0.3)
        return real(folder, step, taken)

    monkeypatch.setattr(keeping.checkpoint, "save", slow)

    def sink(event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise RuntimeError("no more")

    setup = make_setup(trainer={"epochs": 2, "steps_per_checkpoint": 2}, evaluate=None, sink=sink)
    with pytest.raises(RuntimeError):
        fit(setup)
    assert checkpoint.steps_in(setup.checkpoints) == [2]


def test_a_damaged_best_is_named_and_the_last_weights_stay(make_setup) -> None:
    values, events = iter([1.0, 2.0, 3.0]), []

    def sink(event) -> None:
        events.append(event)
        if isinstance(event, Stepped) and event.split == "train" and event.step == 8:
            (setup.checkpoints / "step-000003" / "weights.safetensors").write_bytes(b"rubbish")

    setup = make_setup(trainer={"epochs": 3}, evaluate=lambda _: {"loss": next(values)}, sink=sink)
    assert fit(setup).best_step == 3
    told = [event.text for event in events if isinstance(event, Warned)]
    assert len(told) == 1 and "step 3 is damaged" in told[0] and "step 9 are kept" in told[0]
