"""The loop: learns, resumes bit for bit, keeps the best, stops when told, loses nothing when it fails."""

import json
import os
import signal
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, get_peft_model
from tiny_training import make_examples, make_model

from luthier.errors import ConfigError, Interrupted, RunError, TrainingError
from luthier.events import Planned, Saved, Stepped, Warned
from luthier.plan import recorded
from luthier.run import MetricsWriter, atomic, read_metrics
from luthier.train import checkpoint, evaluation, step
from luthier.train.comm import OneRank
from luthier.train.hooks import Best
from luthier.train.loop import fit, optimizer_of, trainable
from luthier.train.optimizer import make_state
from luthier.train.passes import passes_that_fit, planned
from luthier.train.state import new_training
from luthier.train.step import _run_passes
from luthier.types import Plan


def weights(setup) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainable(setup.model).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_reports(make_setup) -> None:
    events = []
    setup = make_setup(sink=events.append, trainer={"epochs": 6})
    first = setup.evaluate(planned(setup.plan))["loss"]
    setup = replace(setup, evaluate=setup.evaluate, save_adapter=lambda: setup.checkpoints / "adapter")
    outcome = fit(setup)
    lines = [event for event in events if isinstance(event, Stepped) and event.split == "train"]
    assert outcome.steps == len(lines) == 18
    assert lines[-1].loss < lines[0].loss
    assert len(outcome.evaluations) == 6
    assert {"loss", "perplexity", "token_accuracy"} <= outcome.evaluations[0].keys()
    assert {"learning_rate", "tokens_per_s", "supervised_tokens", "memory_gib"} <= lines[0].values.keys()
    assert outcome.best_value == min(one["loss"] for one in outcome.evaluations)
    assert setup.evaluate(planned(setup.plan))["loss"] == pytest.approx(
        outcome.best_value, abs=1e-6
    )  # the best weights are in place
    assert first == pytest.approx(first)
    assert json.loads(json.dumps(outcome.to_json()))["metric"] == "loss"
    assert [event.what for event in events if isinstance(event, Saved)][-1] == "adapter"


def test_every_line_of_the_metrics_has_the_promised_keys(make_setup, tmp_path) -> None:
    setup = make_setup(trainer={"epochs": 2}, sink=MetricsWriter(tmp_path / "metrics.jsonl"))
    outcome = fit(replace(setup, evaluate_train=setup.evaluate))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert {line["split"] for line in lines} == {"train", "validation", "train_evaluation"}
    promised = {"time", "step", "epoch", "split", "loss", "learning_rate", "tokens_per_s", "supervised_tokens"}
    for line in lines:
        assert promised | {"memory_gib"} <= line.keys(), line["split"]
        assert all(isinstance(line[name], (int, float)) and line[name] > 0 for name in ("tokens_per_s", "time"))
    # the hooks, whose state is in checkpoints, do not see what is another one in each run
    assert not any("tokens_per_s" in name for one in outcome.evaluations for name in one)


def test_an_evaluations_throughput_is_that_of_its_passes(make_setup, monkeypatch) -> None:
    setup, now, passes = make_setup(), [100.0], []
    evaluate = setup.evaluate
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def scored(batch):
        now[0] += 2.0
        passes.append(batch)
        return evaluate.score(batch)

    def generated() -> dict[str, float]:
        now[0] += 1000.0
        return {"rouge_l": 0.5}

    values = replace(evaluate, max_rows=3, score=scored, generated=generated)(planned(setup.plan))
    every = sum(example.length for example in evaluate.examples[:3])
    assert values["tokens_per_s"] == every / (2.0 * len(passes)) and values["rouge_l"] == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor", "lion"])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(make_setup, tmp_path, optimizer) -> None:
    options = {"optimizer": {"type": optimizer, "weight_decay": 0.01}, "steps_per_checkpoint": 2, "epochs": 2}
    straight = make_setup(trainer=options, dropout=0.1, checkpoints=tmp_path / "straight")
    fit(straight)

    class Stop(Exception):
        pass

    def crash(event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise Stop

    broken = make_setup(trainer=options, dropout=0.1, sink=crash)
    with pytest.raises(Stop):
        fit(broken)
    resumed = make_setup(trainer=options, dropout=0.1)
    torch.manual_seed(12345)  # another process has other random numbers
    assert fit(resumed).resumed_from == 4
    assert same(weights(straight), weights(resumed))
    left, right = (checkpoint.load(one.checkpoints, 6) for one in (straight, resumed))
    assert same(left.weights, right.weights)
    for index, values in left.optimizer["state"].items():
        for name, value in values.items():
            other = right.optimizer["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert left.state["hooks"] == right.state["hooks"]


def test_plans_do_not_change_the_result(make_setup, tmp_path) -> None:
    one = make_setup(tokens_per_pass=1, checkpoints=tmp_path / "a")
    all_ = make_setup(tokens_per_pass=9999, checkpoints=tmp_path / "b")
    assert fit(one).best_value == pytest.approx(fit(all_).best_value, abs=1e-4)


def test_not_finite_updates_nothing_and_leaves_a_record(make_setup) -> None:
    setup = make_setup()
    logprobs, calls = setup.logprobs, []

    def poisoned(batch):
        calls.append(0)
        return logprobs(batch) * (float("nan") if len(set_steps) >= 2 else 1.0)

    set_steps = []
    seen = {}

    def sink(event) -> None:
        if isinstance(event, Stepped) and event.split == "train":
            set_steps.append(event.step)
            seen["after"] = weights(setup)

    setup = replace(setup, logprobs=poisoned, sink=sink)
    with pytest.raises(TrainingError) as caught:
        fit(setup)
    assert caught.value.code == "training-not-finite"
    assert "rows" in str(caught.value)
    assert same(weights(setup), seen["after"])
    assert checkpoint.steps_in(setup.checkpoints) == [2]
    assert json.loads((setup.checkpoints / "failed-step.json").read_text())["step"] == 3
    assert checkpoint.load(setup.checkpoints, 2).state["source"] == {"epoch": 0, "step": 2}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_a_checkpoint_and_says_how_to_go_on(make_setup, number, code) -> None:
    def send(event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    setup = make_setup(sink=send, resume_hint="luthier train c.yaml --output out")
    with pytest.raises(Interrupted) as caught:
        fit(setup)
    assert caught.value.code == "run-interrupted"
    assert caught.value.exit_code == code
    assert "luthier train c.yaml --output out" in str(caught.value)
    assert checkpoint.steps_in(setup.checkpoints) == [2]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("which", ["evaluate", "evaluate_train"])
def test_an_evaluation_that_a_signal_ends_is_done_again(make_setup, tmp_path, which) -> None:
    """It ends at once, its values are nobody's, and the resumed run has the files of a straight one."""
    options = {"steps_per_checkpoint": 3, "steps_per_evaluation": 3, "epochs": 2, "keep_last": 1}

    def made(name: str, **changes):
        told = MetricsWriter(tmp_path / f"{name}.jsonl")
        setup = make_setup(trainer=options, dropout=0.1, checkpoints=tmp_path / name, sink=told)
        return replace(setup, **{"evaluate_train": setup.evaluate, **changes})

    def interrupted(_):
        torch.rand(1)  # moves the random numbers, and has no time to put them back
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    fit(made("straight"))
    began = time.monotonic()
    with pytest.raises(Interrupted, match="its evaluation will be done again"):
        fit(made("broken", **{which: interrupted}))
    assert time.monotonic() - began < 15
    assert checkpoint.load(tmp_path / "broken", 3).state["pending"]["wanted"]["save"]
    fit(made("broken"))
    left, right = (checkpoint.load(tmp_path / name, 6) for name in ("straight", "broken"))
    assert same(left.weights, right.weights) and left.state == right.state
    lines = [[(line["step"], line["split"], line["loss"]) for line in read_metrics(tmp_path / f"{name}.jsonl")]
             for name in ("straight", "broken")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 6 + 4


@pytest.mark.parametrize(("patience", "stopped"), [(-1, None), (0, None), (1, 1), (2, 2)])
def test_early_stop_counts_evaluations_without_progress_and_zero_is_never(patience: int, stopped: int | None) -> None:
    best = Best("loss", patience)
    waited = [best.after_evaluation(at, {"loss": 1.0}).stop is not None for at in range(4)]
    assert waited.index(True) == stopped if stopped is not None else not any(waited)


def test_early_stopping_restores_the_best_and_a_finished_run_stays_finished(make_setup) -> None:
    values = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    setup = make_setup(
        trainer={"epochs": 5, "early_stop": 2, "keep_last": 1}, evaluate=lambda _: {"loss": next(values)}
    )
    outcome = fit(setup)
    assert (outcome.stopped, outcome.best_step, outcome.best_value, outcome.steps) == ("early", 6, 1.0, 12)
    assert checkpoint.steps_in(setup.checkpoints) == [6, 12]
    assert same(weights(setup), dict(checkpoint.load(setup.checkpoints, 6).weights))
    again = make_setup(trainer={"epochs": 5, "early_stop": 2, "keep_last": 1}, evaluate=lambda _: {"loss": 0.0})
    assert fit(again).steps == 12
    assert same(weights(again), weights(setup))


def test_plateau_lowers_the_rate(make_setup) -> None:
    scheduler = {"decay": None, "warmup_fraction": 0, "reduce_on_plateau": 1, "reduce_on_plateau_patience": 2}
    rates = []
    setup = make_setup(
        trainer={"epochs": 5, "learning_rate_scheduler": scheduler},
        evaluate=lambda _: {"loss": 1.0},
        sink=lambda e: (
            rates.append(e.values["learning_rate"]) if isinstance(e, Stepped) and e.split == "train" else None
        ),
    )
    fit(setup)
    assert rates == pytest.approx([1e-2] * 9 + [1e-3] * 6)


def test_a_damaged_checkpoint_is_passed_over_and_the_last_one_refused(make_setup) -> None:
    options = {"steps_per_checkpoint": 2, "epochs": 2, "keep_last": 9}
    setup = make_setup(trainer=options)
    fit(setup)
    (setup.checkpoints / "step-000006" / "weights.safetensors").write_bytes(b"rubbish")
    events = []
    assert fit(make_setup(trainer=options, sink=events.append)).resumed_from == 4
    assert any(isinstance(event, Warned) for event in events)
    for number in checkpoint.steps_in(setup.checkpoints):
        atomic.write_text(setup.checkpoints / f"step-{number:06d}" / "state.json", "{}")
    with pytest.raises(RunError) as caught:
        fit(make_setup(trainer=options))
    assert caught.value.code == "run-damaged"


def test_out_of_memory_makes_smaller_passes_or_says_what_to_do(make_setup) -> None:
    events = []
    setup = make_setup(tokens_per_pass=80, sink=events.append, trainer={"epochs": 1})
    logprobs = setup.logprobs

    def small(batch):
        if len(batch.lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(batch)

    fit(replace(setup, logprobs=small, evaluate=None))
    assert any(isinstance(event, Planned) for event in events)

    def never(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError) as caught:
        room = {"more_room": lambda plan: ("execution.weights=streamed",), "resume_hint": "luthier train --resume here"}
        fit(make_setup(logprobs=never, checkpoints=setup.checkpoints / "b", **room))
    assert caught.value.code == "training-no-memory"
    said = str(caught.value.faults[0].fix)  # what loses nothing comes first
    assert said.startswith("luthier train --resume here --set execution.weights=streamed")
    assert 0 < said.index("end other programs") < said.index("max_sequence_length, which changes what is learned")


def test_a_leaner_plan_than_small_passes_recomputes(make_setup) -> None:
    """Once a pass holds one row, the plan in force is asked for recomputing; the weights come out the same."""
    seen: list[Plan] = []

    def leaner(plan: Plan, longest: int) -> Plan | None:
        found = recorded.leaner(plan, longest, layers=2)
        seen.append(found)
        return found

    setup = make_setup(trainer={"train_steps": 2}, evaluate=None)
    logprobs = setup.logprobs

    def tight(batch):
        if not (seen and seen[-1].checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(batch)

    fit(replace(setup, logprobs=tight, leaner=leaner))
    assert seen[-1].recompute_layers == 2 and [plan.recompute_layers for plan in seen[:-1]] == [0] * (len(seen) - 1)
    assert seen[-1].tokens_per_pass < setup.plan.tokens_per_pass
    other = make_setup(trainer={"train_steps": 2}, evaluate=None, checkpoints=setup.checkpoints / "b")
    fit(other)
    for mine, theirs in zip(setup.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_evaluation_that_runs_out_of_memory_takes_a_leaner_plan_and_gives_the_same(make_setup) -> None:
    """It begins with the plan in force, and what it had to change is in force in the next step."""
    seen, events, adopted = [], [], []
    setup = make_setup(tokens_per_pass=80, sink=events.append, adopt=adopted.append, trainer={"train_steps": 2})
    wanted = setup.evaluate(planned(setup.plan))

    def tight(batch):
        seen.append(len(batch.lengths))
        if len(batch.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return setup.evaluate.score(batch)

    now = new_training(setup, optimizer_of(setup))
    runner = partial(passes_that_fit, setup, now, "the evaluation after step 1")
    found = replace(setup.evaluate, score=tight)(runner)
    for name in ("loss", "supervised_tokens", "token_accuracy"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)
    assert seen[0] > 1 and seen[-5:] == [1] * 5
    whys = [event.why for event in events if isinstance(event, Planned)]
    assert whys and set(whys) == {"out of memory in the evaluation after step 1"}
    assert now.plan == adopted[-1] and now.plan.tokens_per_pass < 80
    count = len(seen)
    replace(setup.evaluate, score=tight)(runner)
    assert seen[count:] == [1] * 5  # at once as it fits

    fit(replace(setup, evaluate=replace(setup.evaluate, score=tight)))  # the loop hands it that runner
    with pytest.raises(TrainingError, match="evaluation after step") as caught:
        none = make_setup(checkpoints=setup.checkpoints / "b", leaner=lambda *_: None)
        fit(replace(none, evaluate=replace(setup.evaluate, score=tight)))
    assert caught.value.code == "training-no-memory"


def test_all_ranks_adopt_what_the_evaluation_of_the_first_had_to_change(make_setup) -> None:
    """Another plan would cut the next step another way than rank 0 does."""
    other, adopted = Plan("cpu", 20, reasons={"tokens_per_pass": "memory ran out with 64"}), []

    class Second(OneRank):
        def made_by_first(self, make, received, pass_on):
            return {"loss": 1.0}

        def share(self, value):
            return value if value is None or "tokens_per_pass" not in value else json.loads(json.dumps(asdict(other)))

    fit(make_setup(comm=Second(), adopt=adopted.append, trainer={"epochs": 2}))
    assert adopted == [other]


def test_state_that_the_device_has_no_room_for_waits_on_the_host_from_the_start(make_setup, monkeypatch) -> None:
    """Nothing was updated yet: the weights come out as if the plan had said so."""
    events, adopted, made = [], [], []
    setup = make_setup(trainer={"train_steps": 3}, evaluate=None, sink=events.append, adopt=adopted.append)

    def full(optimizer: torch.optim.Optimizer) -> None:
        assert not optimizer.state  # what there was room for is let go before the rest is tried again
        make_state(optimizer)
        made.append(optimizer)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "make_state", full)
    monkeypatch.setattr(step, "state_on_host", lambda plan, declared: replace(plan, optimizer="host"))
    fit(setup)
    assert made[0] is made[1] and len(made) == 2
    assert [plan.optimizer for plan in adopted] == ["host"]
    (told,) = [event for event in events if isinstance(event, Planned)]
    assert told.plan["optimizer"] == "host" and "optimizer remembers" in told.why

    monkeypatch.undo()
    other = make_setup(trainer={"train_steps": 3}, evaluate=None, checkpoints=setup.checkpoints / "b")
    fit(other)
    assert all(map(torch.equal, setup.model.parameters(), other.model.parameters()))

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(TrainingError, match="before the first step") as caught:
        fit(make_setup(checkpoints=setup.checkpoints / "c"))
    assert caught.value.code == "training-no-memory"


def test_an_update_without_memory_ends_with_what_to_do_and_saves_no_half_of_it(make_setup, monkeypatch) -> None:
    setup = make_setup(trainer={"steps_per_checkpoint": 2, "keep_last": 9}, evaluate=None, resume_hint="luthier …")
    real, count = torch.optim.AdamW.step, []

    def torn(self, *arguments, **named):
        count.append(0)
        if len(count) == 5:  # the first makes the state
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    with pytest.raises(TrainingError, match="in the update of step 4") as caught:
        fit(setup)
    (fault,) = caught.value.faults
    assert (fault.code, fault.received) == ("training-no-memory", "CUDA out of memory") and "luthier …" in fault.fix
    assert checkpoint.steps_in(setup.checkpoints) == [2]
    monkeypatch.undo()
    straight = make_setup(trainer={}, evaluate=None, checkpoints=setup.checkpoints / "straight")
    fit(straight)
    resumed = make_setup(trainer={}, evaluate=None)
    assert fit(resumed).resumed_from == 2 and same(weights(resumed), weights(straight))


@pytest.mark.parametrize(("of_the_base", "said"), [(0.1, "; dropout draws other masks from here on"), (0.0, "")])
def test_a_leaner_plan_says_where_dropout_depends_on_the_cut(make_setup, tiny_llama, of_the_base, said) -> None:
    """An adapter's does not."""
    events, model = [], make_model(tiny_llama, dropout=0.1)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = of_the_base
    setup = make_setup(model=model, tokens_per_pass=80, sink=events.append, evaluate=None, trainer={"train_steps": 1})

    def small(batch):
        if len(batch.lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return setup.logprobs(batch)

    fit(replace(setup, logprobs=small, trainer=setup.trainer.model_copy(update={"train_steps": 2})))
    whys = {event.why for event in events if isinstance(event, Planned)}
    assert whys == {f"out of memory in step 1{said}"}
    told = [event.text for event in events if isinstance(event, Warned) and "draws other masks" in event.text]
    assert len(told) == bool(said) and all("layers.0.self_attn" in text for text in told)  # once


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n")  # BOFT runs without
@pytest.mark.parametrize("config", [
    LoHaConfig(r=4, rank_dropout=0.4, module_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    LoKrConfig(r=4, rank_dropout=0.4, module_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    BOFTConfig(boft_block_size=4, boft_dropout=0.4, target_modules=["q_proj"]),
], ids=["loha", "lokr", "boft"])  # fmt: skip
def test_what_drops_weights_drops_the_same_in_all_passes_of_a_step(make_setup, tiny_llama, config) -> None:
    model = make_model(tiny_llama, adapter=False).double()
    torch.manual_seed(3)
    model = get_peft_model(model, config).double().train()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    setup = make_setup(model=model)
    now = new_training(setup, torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad]))
    examples = make_examples(6)
    constants = setup.objective.prepare(examples)

    def gradient(cut: list[list], step: int = 0) -> torch.Tensor:
        now.step = step
        _run_passes(setup, now, cut, constants)
        trained = [w for w in model.parameters() if w.requires_grad]
        found = torch.cat([torch.zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in trained])
        model.zero_grad()
        return found

    want = gradient([examples])
    assert float((gradient([[one] for one in examples]) - want).norm() / want.norm()) < 1e-6
    assert float((gradient([[], examples[:2], examples[2:]]) - want).norm() / want.norm()) < 1e-6
    assert max(float((gradient([examples], step) - want).norm() / want.norm()) for step in (1, 2)) > 0.01


def test_an_unknown_validation_metric_lists_what_there_is(make_setup) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(make_setup(trainer={"validation_metric": "los"}))
    assert caught.value.code == "config-bad-value"
    assert "perplexity" in str(caught.value)


def test_evaluation_moves_no_random_numbers_and_keeps_the_mode(make_setup) -> None:
    setup = make_setup()
    setup.model.train()
    before = torch.get_rng_state()
    setup.evaluate(planned(setup.plan))
    assert torch.equal(before, torch.get_rng_state())
    assert setup.model.training
