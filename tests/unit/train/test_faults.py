"""What is not finite updates nothing and is never saved; spikes are seen; a rewound run goes on with other rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_training import make_examples

from luthier.data.source import TableSource
from luthier.errors import TrainingError
from luthier.events import Rewound, Stepped, Warned
from luthier.run import MetricsWriter, read_metrics
from luthier.train import checkpoint, state
from luthier.train.loop import fit, trainable
from luthier.train.spike import Spike


class Crash(Exception):
    """Ends a run where nobody expected it."""


FIFTH = 5  # the step that is spoiled


def once(seen: list[int], value: float):
    """1, but ``value`` when it is asked in the fifth step for the first time."""
    done: list[int] = []

    def factor() -> float:
        if len(seen) + 1 != FIFTH or done:
            return 1.0
        done.append(1)
        return value

    return factor


def spoil_loss(setup, seen):
    logprobs, factor = setup.logprobs, once(seen, math.nan)
    return replace(setup, logprobs=lambda batch: logprobs(batch) * factor())


def spoil_gradient(setup, seen):
    factor = once(seen, math.inf)
    next(iter(trainable(setup.model).values())).register_hook(lambda grad: grad * factor())
    return setup


def spoil_weights(setup, seen):
    weight = next(iter(trainable(setup.model).values()))
    sink, done = setup.sink, []

    def and_spoil(event) -> None:
        sink(event)
        if isinstance(event, Stepped) and event.split == "train" and event.step == FIFTH - 1 and not done:
            done.append(1)
            with torch.no_grad():
                weight.view(-1)[3] = math.nan

    return replace(setup, sink=and_spoil)


SPOILERS = {"loss": spoil_loss, "gradient": spoil_gradient, "weights": spoil_weights}


@pytest.fixture
def spoiled(make_setup):
    """A setup whose fifth step is spoiled in one of three ways, and the train steps and other events it told of."""

    def make(where: str, **trainer):
        seen, events = [], []

        def sink(event) -> None:
            events.append(event)
            if isinstance(event, Stepped) and event.split == "train":
                seen.append(event.step)

        options = {"epochs": 4, "steps_per_checkpoint": 2, "keep_last": 9, **trainer}
        setup = make_setup(trainer=options, sink=sink, evaluate=None)
        return SPOILERS[where](setup, seen), seen, events

    return make


@pytest.mark.parametrize("where", SPOILERS)
def test_stop_never_saves_what_is_not_finite(spoiled, where: str) -> None:
    setup, seen, _ = spoiled(where)
    with pytest.raises(TrainingError) as caught:
        fit(setup)
    assert caught.value.code == "training-not-finite" and caught.value.exit_code == 6
    for number in checkpoint.steps_in(setup.checkpoints):
        found = checkpoint.load(setup.checkpoints, number)
        assert all(bool(weight.isfinite().all()) for weight in found.weights.values())
        moments = [v for of in found.optimizer["state"].values() for v in of.values() if isinstance(v, torch.Tensor)]
        assert moments and all(bool(one.isfinite().all()) for one in moments)
    # weights are spoiled after the fourth step, whose checkpoint is refused; the others fail in the fifth
    assert checkpoint.steps_in(setup.checkpoints) == ([2] if where == "weights" else [2, 4])
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("where", SPOILERS)
def test_the_step_that_failed_is_recorded_with_its_rows_and_the_metrics_before_it(
    spoiled, tmp_path, monkeypatch, where: str
) -> None:
    """All its rows as numbers, also where an error shows a few, and what was told last, as in metrics.jsonl."""
    setup, _, _ = spoiled(where, batch_size=20)
    source = TableSource(make_examples(99), 20, 42, "data")
    told = MetricsWriter(tmp_path / "metrics.jsonl")
    sink = setup.sink
    setup = replace(setup, source=source, sink=lambda event: (sink(event), told(event)))
    with pytest.raises(TrainingError):
        fit(setup)
    failed = json.loads((setup.checkpoints / "failed-step.json").read_text())
    step = 4 if where == "weights" else 5  # weights are spoiled after the fourth, whose checkpoint is refused
    source.restore(failed["source"])
    assert failed["step"] == step and failed["faults"][0]["code"] == "training-not-finite"
    assert failed["rows"] == sorted(example.row for example in source.next_step()) and len(failed["rows"]) > 16
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert failed["metrics"] == [last] and last["step"] == 4 and last["gradient_norm"] > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_step_passes_the_rows_over(spoiled, where: str) -> None:
    setup, seen, events = spoiled(where, on_nonfinite="skip_step")
    before = {}
    sink = setup.sink

    def remember(event) -> None:
        if isinstance(event, Stepped) and event.step in (4, 5):
            before[event.step] = [weight.detach().clone() for weight in trainable(setup.model).values()]
        sink(event)

    outcome = fit(replace(setup, sink=remember))
    assert outcome.steps == 12 and seen == list(range(1, 13))
    assert all(torch.equal(a, b) for a, b in zip(before[4], before[5], strict=True))
    told = [event for event in events if isinstance(event, Warned)]
    assert len(told) == 1 and told[0].data["step"] == 5 and told[0].data["rows"]
    skipped = [event.step for event in events if isinstance(event, Stepped) and event.values.get("skipped")]
    assert skipped == [5]


def test_skipping_ends_when_every_step_is_bad(make_setup) -> None:
    setup = make_setup(trainer={"epochs": 99, "on_nonfinite": "skip_step"}, evaluate=None)
    logprobs = setup.logprobs
    steps = []
    setup = replace(setup, logprobs=lambda batch: logprobs(batch) * math.nan, sink=lambda event: steps.append(event))
    with pytest.raises(TrainingError, match="step 21"):
        fit(setup)
    assert len([event for event in steps if isinstance(event, Stepped)]) == 20


@pytest.mark.parametrize("where", SPOILERS)
def test_rewind_puts_the_newest_checkpoint_back_and_takes_other_rows(spoiled, where: str) -> None:
    setup, seen, events = spoiled(where, on_nonfinite="rewind")
    outcome = fit(setup)
    back = [event for event in events if isinstance(event, Rewound)]
    assert outcome.steps == 12 and all(bool(weight.isfinite().all()) for weight in trainable(setup.model).values())
    assert [(event.step, event.failed) for event in back] == ([(2, 4)] if where == "weights" else [(4, 4)])
    assert seen == ([*range(1, 5), *range(3, 13)] if where == "weights" else list(range(1, 13)))
    # the rows of the steps that were given up are not taken again: the source is that many steps ahead
    ahead = 2 if where == "weights" else 1
    assert checkpoint.load(setup.checkpoints, 12).state["source"] == {
        "epoch": (12 + ahead) // 3, "step": (12 + ahead) % 3
    }  # fmt: skip
    assert checkpoint.load(setup.checkpoints, 12).state["rewinds"] == 1


def test_rewinding_in_vain_ends_with_the_failure(make_setup) -> None:
    """Each time one checkpoint further back, then no more."""
    setup = make_setup(trainer={"epochs": 4, "steps_per_checkpoint": 1, "on_nonfinite": "rewind"}, evaluate=None)
    logprobs, events = setup.logprobs, []
    seen = lambda: max((e.step for e in events if isinstance(e, Stepped)), default=0)  # noqa: E731
    setup = replace(setup, sink=events.append, logprobs=lambda b: logprobs(b) * (math.nan if seen() >= 3 else 1.0))
    with pytest.raises(TrainingError, match="not a finite number"):
        fit(setup)
    assert [event.step for event in events if isinstance(event, Rewound)] == [3, 2]  # keep_last is 2


def test_the_first_steps_have_something_to_rewind_to(make_setup) -> None:
    setup = make_setup(trainer={"epochs": 1, "on_nonfinite": "rewind"}, evaluate=None)
    logprobs, calls = setup.logprobs, []

    def first_is_bad(batch):
        calls.append(1)
        return logprobs(batch) * (math.nan if len(calls) == 1 else 1.0)

    assert fit(replace(setup, logprobs=first_is_bad)).steps == 3


@pytest.fixture
def in_fp16(make_setup, monkeypatch):
    """A setup in fp16 whose gradients overflow in the steps (from 1) that ``bad`` names, and the steps it told of."""
    monkeypatch.setattr(state, "scaler", lambda precision, device: torch.amp.GradScaler("cpu"))

    def make(bad, **trainer):
        told = []

        def sink(event) -> None:
            if isinstance(event, Stepped):
                told.append((event.step, "skipped" in event.values))

        setup = make_setup(trainer=trainer, evaluate=None, precision="fp16", sink=sink)
        weight = next(iter(trainable(setup.model).values()))
        weight.register_hook(lambda grad: grad * (math.inf if bad(len(told) + 1) else 1.0))
        return setup, told

    return make


def test_fp16_overflows_in_a_row_end_the_run(in_fp16) -> None:
    """Twenty are the scale on its way down; one more is a gradient that no scale makes finite."""
    setup, told = in_fp16(lambda number: number > 2, epochs=99, steps_per_checkpoint=2)
    with pytest.raises(TrainingError, match="step 23 has a gradient that is not a finite number") as caught:
        fit(setup)
    assert caught.value.code == "training-not-finite" and caught.value.exit_code == 6
    assert [number for number, skipped in told if skipped] == list(range(3, 23)) and len(told) == 22
    assert json.loads((setup.checkpoints / "failed-step.json").read_text())["step"] == 23
    weights = [checkpoint.load(setup.checkpoints, 22).weights, trainable(setup.model)]
    assert all(bool(weight.isfinite().all()) for of in weights for weight in of.values())


def test_fp16_overflows_between_good_steps_never_end_the_run(in_fp16) -> None:
    """Far more of them than may come in a row."""
    setup, told = in_fp16(lambda number: number % 3 != 0, epochs=16)
    assert fit(setup).steps == 48
    assert [number for number, skipped in told if skipped] == [number for number in range(1, 49) if number % 3]
    assert len(told) == 48 and checkpoint.load(setup.checkpoints, 48).state["skipped"] == 0


def test_fp16_overflows_are_skipped_counted_and_resume(make_setup, tmp_path, monkeypatch) -> None:
    """Not a fault: the scale halves and grows; it and the count of skipped steps go on bit for bit."""
    made = []

    def scaler(precision, device):
        made.append(torch.amp.GradScaler("cpu", growth_interval=3, enabled=precision == "fp16"))
        return made[-1]

    monkeypatch.setattr(state, "scaler", scaler)

    def run(folder, stop_at: int = 0):
        steps = []

        def sink(event) -> None:
            if isinstance(event, Stepped):
                steps.append((event.step, "skipped" in event.values))
                if event.step == stop_at:
                    raise Crash

        options = {"epochs": 4, "steps_per_checkpoint": 1, "keep_last": 99}
        setup = make_setup(trainer=options, evaluate=None, precision="fp16", checkpoints=folder, sink=sink)
        weight = next(iter(trainable(setup.model).values()))
        weight.register_hook(lambda grad: grad * (math.inf if made[-1].get_scale() > 2.0**14 else 1.0))
        return setup, steps

    straight, steps = run(tmp_path / "a")
    fit(straight)
    # 2^16 and 2^15 overflow; three good steps at 2^14, then the scale grows and overflows again
    assert [number for number, skipped in steps if skipped] == [1, 2, 6, 10]
    for stop_at in (3, 6, 11):
        broken, _ = run(tmp_path / "b", stop_at=stop_at)
        with pytest.raises(Crash):
            fit(broken)
    again, _ = run(tmp_path / "b")
    fit(again)
    for number in range(1, 13):
        left, right = (checkpoint.load(folder, number) for folder in (tmp_path / "a", tmp_path / "b"))
        assert left.state == right.state
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)
    assert checkpoint.load(tmp_path / "a", 2).state["skipped"] == 2


def test_a_spike_is_a_loss_far_above_the_median() -> None:
    spike = Spike(8, 10.0, rewind=False)
    losses = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0]
    assert [spike.after_step(i, loss).warn for i, loss in enumerate([*losses, 50.0])] == [None] * 8  # no window yet
    spike = Spike(8, 10.0, rewind=False)
    for number, loss in enumerate([*losses, 2.1]):
        spike.after_step(number, loss)
    middle, mad = 2.0, 0.1
    assert spike.bound == pytest.approx(middle + 10 * mad)
    assert spike.after_step(9, 2.9).warn is None
    assert "3.5000" in (spike.after_step(10, 3.5).warn or "")
    assert spike.after_step(11, 3.6).warn is None  # one warning a spike
    again = Spike(8, 10.0, rewind=False)
    again.restore(json.loads(json.dumps(spike.state())))
    assert again.bound == spike.bound and again.spiking
    assert spike.after_step(12, math.nan).warn is None
    still = Spike(8, 10.0, rewind=True)
    for number in range(8):
        still.after_step(number, 1.0)
    assert still.after_step(8, 1.09).rewind is None and still.after_step(9, 1.2).rewind


def test_a_spike_rewinds(make_setup) -> None:
    options = {"epochs": 8, "steps_per_checkpoint": 2, "on_spike": "rewind", "spike_window": 8, "spike_threshold": 30}
    setup = make_setup(trainer=options, evaluate=None, learning_rate=1e-4, tokens_per_pass=9999)  # one pass a step
    logprobs, events, calls = setup.logprobs, [], []

    def jump(batch):
        calls.append(1)
        return logprobs(batch) * (100.0 if len(calls) == 13 else 1.0)

    outcome = fit(replace(setup, logprobs=jump, sink=events.append))
    back = [event for event in events if isinstance(event, Rewound)]
    assert [(event.step, event.failed) for event in back] == [(12, 13)] and "jumped" in back[0].why
    assert outcome.steps == 24


def test_a_spike_that_comes_again_after_every_rewind_ends_the_training(make_setup) -> None:
    options = {"epochs": 8, "steps_per_checkpoint": 2, "on_spike": "rewind", "spike_window": 8, "spike_threshold": 30}
    setup = make_setup(trainer=options, evaluate=None, learning_rate=1e-4, tokens_per_pass=9999)  # one pass a step
    logprobs, events, calls = setup.logprobs, [], []

    def jump(batch):
        calls.append(1)
        return logprobs(batch) * (100.0 if len(calls) >= 13 else 1.0)

    with pytest.raises(TrainingError) as caught:
        fit(replace(setup, logprobs=jump, sink=events.append))
    assert caught.value.code == "training-spike" and "learning_rate" in (caught.value.faults[0].fix or "")
    assert [event.step for event in events if isinstance(event, Rewound)] == [12, 10]  # keep_last is 2


def test_what_lies_after_a_damaged_checkpoint(make_setup) -> None:
    """Damaged ones are set aside, do not count among the last ones, and are replaced."""
    options = {"epochs": 4, "steps_per_checkpoint": 1, "keep_last": 2}
    values = {3: 1.0, 6: 0.5, 9: 2.0, 12: 2.0}
    at = [0]

    def sink(event) -> None:
        if isinstance(event, Stepped) and event.split == "train":
            at[0] = event.step
            if event.step == stop_at:
                raise Crash

    stop_at = 8
    setup = make_setup(trainer=options, sink=sink, evaluate=lambda _: {"loss": values[at[0]]})
    with pytest.raises(Crash):
        fit(setup)
    assert checkpoint.steps_in(setup.checkpoints) == [6, 7]
    (setup.checkpoints / "step-000007" / "state.json").write_text("{}")
    stop_at, warned = 0, []
    setup = make_setup(
        trainer=options, evaluate=lambda _: {"loss": values[at[0]]},
        sink=lambda event: (sink(event), warned.append(event.text) if isinstance(event, Warned) else None),
    )  # fmt: skip
    assert fit(setup).resumed_from == 6
    assert "step 7 is damaged" in warned[0]
    assert checkpoint.steps_in(setup.checkpoints) == [6, 11, 12]
    assert not list(setup.checkpoints.glob("damaged-*")) and not list(setup.checkpoints.glob(".staging*"))
    checkpoint.load(setup.checkpoints, 12)


def test_a_best_that_only_an_older_checkpoint_knows_is_kept(make_setup) -> None:
    values = {3: 2.0, 6: 1.0}
    at = [0]

    def sink(event) -> None:
        if isinstance(event, Stepped) and event.split == "train":
            at[0] = event.step

    setup = make_setup(trainer={"epochs": 2, "steps_per_checkpoint": 1}, sink=sink,
                       evaluate=lambda _: {"loss": values[at[0]]})  # fmt: skip
    fit(setup)
    assert checkpoint.steps_in(setup.checkpoints) == [3, 5, 6]  # 6 is the best; 5 knows of 3 alone
