"""Schedules, optimizers, precision, trackers."""

from typing import get_args

import pytest
import torch

from luthier.config.optimizer import Optimizer, OptimizerType
from luthier.config.schedule import Schedule as Scheduler
from luthier.errors import ConfigError, DependencyError
from luthier.train.optimizer import OPTIMIZERS, Lion, build_optimizer
from luthier.train.precision import resolve_precision
from luthier.train.schedule import cut_warmup, factor, warmup_steps
from luthier.train.trackers import open_tracker
from luthier.types import Gpu, Machine


def factors(total: int = 10, per_evaluation: int = 5, **section) -> list[float]:
    return [factor(Scheduler(**section), step, total, per_evaluation, 2.0) for step in range(total)]


def test_warm_up_counts_optimizer_steps_and_wastes_none() -> None:
    assert warmup_steps(Scheduler(warmup_fraction=0.03), 100, 5) == 3
    assert warmup_steps(Scheduler(warmup_evaluations=2), 100, 5) == 10
    assert (
        warmup_steps(Scheduler(warmup_steps=101), 100, 5) == 100
        and cut_warmup(Scheduler(warmup_steps=100), 100, 5) is None
    )
    assert "warmup_steps: 101 is longer" in (cut_warmup(Scheduler(warmup_steps=101), 100, 5) or "")
    assert "warmup_evaluations: 21 (105 steps) is longer" in (
        cut_warmup(Scheduler(warmup_evaluations=21), 100, 5) or ""
    )
    assert factors(decay="constant", warmup_fraction=0.3) == pytest.approx([1 / 3, 2 / 3, 1] + [1] * 7)
    assert factors(decay=None, warmup_steps=2) == pytest.approx([0.5] + [1] * 9)


def test_decays() -> None:
    assert factors(decay="linear", warmup_fraction=0) == pytest.approx([1 - step / 10 for step in range(10)])
    cosine = factors(decay="cosine", warmup_fraction=0, eta_min=0.2)  # an absolute rate, a tenth of the peak
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.55)
    assert factor(Scheduler(decay="cosine", warmup_fraction=0, eta_min=0.2), 10, 10, 5, 2.0) == pytest.approx(0.1)
    exponential = factors(decay="exponential", decay_rate=0.5, decay_steps=5, warmup_fraction=0)
    assert exponential[5] == pytest.approx(0.5)
    assert factors(decay="exponential", decay_rate=0.5, decay_steps=5, staircase=True, warmup_fraction=0)[4] == 1


def test_every_declared_optimizer_exists() -> None:
    assert set(get_args(OptimizerType)) <= set(OPTIMIZERS)


def test_paged_and_8_bit_optimizers_need_a_gpu() -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer([("w", torch.nn.Parameter(torch.ones(2, 2)))], Optimizer(type="paged_adamw_8bit"), 1e-3, "cpu")
    assert caught.value.code == "config-conflict"
    assert "type: adamw" in str(caught.value)


def test_groups_spare_norms_from_decay_and_scale_lora_b() -> None:
    named = {
        "lora_A": torch.nn.Parameter(torch.ones(2, 2)),
        "lora_B": torch.nn.Parameter(torch.ones(2, 2)),
        "norm": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    made = build_optimizer(named.items(), Optimizer(weight_decay=0.1), 1e-3, "cpu", loraplus_lr_ratio=16)
    found = [(len(group["params"]), group["weight_decay"], group["lr"]) for group in made.param_groups]
    assert found == [(1, 0.1, 1e-3), (1, 0.1, 16e-3), (1, 0.0, 1e-3)]


def test_lion_moves_by_the_sign() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weight.grad = torch.tensor([3.0, -0.01])
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))


def machine(*gpus: Gpu, bf16: bool = False) -> Machine:
    return Machine(cores=2, memory=8, free_memory=8, gpus=gpus, cpu_bf16=bf16)


T4, L4 = (Gpu("T4", 1, 1, (7, 5)), Gpu("L4", 1, 1, (8, 9)))


@pytest.mark.parametrize(
    ("declared", "on", "expected"),
    [
        ("auto", machine(), "fp32"), ("auto", machine(bf16=True), "bf16"), ("auto", machine(T4), "fp16"),
        ("auto", machine(L4), "bf16"), ("fp32", machine(L4), "fp32"), ("fp16", machine(T4), "fp16"),
        ("auto", machine(Gpu("M2", 1, 1, kind="mps"), bf16=True), "fp32"),
    ],
)  # fmt: skip
def test_precision(declared, on, expected) -> None:
    assert resolve_precision(declared, on) == expected


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_precision("fp16", machine())
    assert caught.value.code == "config-conflict"


def test_a_missing_tracker_names_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(DependencyError) as caught:
        open_tracker("wandb", tmp_path, "run", {})
    assert caught.value.code == "dependency-missing"
    assert "luthier[track]" in str(caught.value)


class Recorder:
    """Stands for any tracker's module, run or writer: notes what is called on it, with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        def call(*given, **named):
            self.calls.append((name, given, named))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "module", "begins", "logs", "ends"),
    [
        ("trackio", "trackio", "init", "log", "finish"),
        ("wandb", "wandb", "init", "log", "finish"),
        ("mlflow", "mlflow", "start_run", "log_metrics", "end_run"),
        ("tensorboard", "torch.utils.tensorboard", "SummaryWriter", "add_scalar", "close"),
    ],
)
def test_a_tracker_gets_the_numbers_by_split(tmp_path, monkeypatch, name, module, begins, logs, ends) -> None:
    import sys

    from luthier.events import Note, Stepped

    fake = Recorder()
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, name, fake)
    tracker = open_tracker(name, tmp_path, "run", {"a": 1})
    assert fake.calls[0][0] == begins
    before = len(fake.calls)
    tracker(Note(text="nothing"))
    assert len(fake.calls) == before
    tracker(Stepped(step=3, total_steps=9, epoch=1.0, split="validation", loss=0.5, values={"perplexity": 1.6}))
    tracker.close()
    want = {"validation/loss": 0.5, "validation/epoch": 1.0, "validation/perplexity": 1.6}
    sent = [call for call in fake.calls if call[0] == logs]
    if name == "tensorboard":
        assert [given for _, given, _ in sent] == [(key, value, 3) for key, value in want.items()]
    else:
        assert sent == [(logs, (want,), {"step": 3})]
    assert fake.calls[-1][0] == ends


def test_a_tracker_that_fails_is_told_once_and_all_are_closed(tmp_path, monkeypatch, capsys) -> None:
    import sys

    from luthier.events import Stepped, Warned
    from luthier.train.trackers import tracking

    class Broken(Recorder):
        def log(self, *given, **named):
            self.calls.append(("log", given, named))
            raise OSError("the server went away")

        def finish(self):
            print("goodbye")
            self.calls.append(("finish", (), {}))

    broken, sound, seen = Broken(), Recorder(), []
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", sound)
    with tracking(("wandb", "trackio"), tmp_path, "run", {}, seen.append) as trackers:
        for step in (1, 2):
            for tracker in trackers:
                tracker(Stepped(step=step, total_steps=2, epoch=1.0, split="train", loss=0.5))
    assert [type(one) for one in seen] == [Warned] and "the server went away" in seen[0].text
    assert [name for name, _, _ in broken.calls] == ["init", "log"], "what has failed is left alone"
    assert [name for name, _, _ in sound.calls] == ["init", "log", "log", "finish"]
    assert capsys.readouterr().out == ""


def test_a_tracker_that_cannot_begin_says_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    import sys

    class NoKey(Recorder):
        def init(self, **named):
            print("Welcome")
            raise ValueError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", NoKey())
    with pytest.raises(DependencyError) as caught:
        open_tracker("wandb", tmp_path, "run", {})
    fault = caught.value.faults[0]
    assert (fault.code, fault.where, fault.received) == ("dependency-failed", "trainer.track", "wandb")
    assert "no API key" in fault.message and fault.fix
    assert capsys.readouterr().out == "", "stdout belongs to the result of the command"
