"""Every kind of adapter and every start: what was trained is what a new process serves, merges and goes on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from luthier import config, pipeline
from luthier.config.adapter import KINDS, Start
from luthier.errors import ConfigError
from luthier.events import Stepped

SMALL = {"type": "lora", "r": 4}
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"type": kind} for kind in KINDS},
    "lora": SMALL,
    "adalora": {"type": "adalora", "init_r": 4, "target_r": 1},
    "loha": {"type": "loha", "r": 4},
    "vera": {"type": "vera", "r": 16},
    "dora": SMALL | {"use_dora": True},
    **{start: SMALL | {"init_lora_weights": start} for start in get_args(Start) if start not in ("default", "loftq")},
    "pissa_niter_4": SMALL | {"init_lora_weights": "pissa_niter_4"},
    "lora, all biases": SMALL | {"bias_type": "all"},
    "adalora, its biases": {"type": "adalora", "init_r": 4, "target_r": 1, "bias_type": "lora_only"},
}
MERGED = {"postprocessor": {"merge_adapter_into_base_model": True}}
STEPS = {"train_steps": 4, "batch_size": 8, "learning_rate": 0.02, "precision": "fp32", "eval_generation_rows": 0}
ASKED = [{"text": f"parcel {i}"} for i in range(3)]
ROWS = [{"text": f"parcel {i}", "answer": f"{'late' if i % 2 else 'early'} {i}"} for i in range(24)]
SERVE = """
import json, sys
import torch
from luthier import pipeline
torch.set_num_threads(1)
runs, rows = json.load(sys.stdin)
out = {}
for name, run in runs.items():
    try:
        tuned = pipeline.load(run)
        found = [tuned.predict(rows, probabilities=True, use_base=base) for base in (False, True)]
        out[name] = [(one.texts, one.log_probabilities) for one in found]
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
json.dump(out, sys.stdout)
"""
Answers = tuple[list[str], list[list[float]]]


@dataclass(frozen=True)
class Made:
    """A run, and what the process that trained it answers."""

    folder: Path
    answers: Answers
    of_base: Answers


class Ended(Exception):
    """What ends a run here."""


@pytest.fixture(scope="module")
def bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The base of a case: the tiny Llama, or one like it with biases that are not zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    biased = tmp_path_factory.mktemp("every") / "biased"
    shutil.copytree(tiny_llama, biased)
    shape = LlamaConfig.from_pretrained(tiny_llama)
    shape.attention_bias = shape.mlp_bias = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(shape)
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(biased)
    return lambda case: biased if "bias" in case else tiny_llama


def settings_of(base: Path, adapter: Mapping[str, Any] | None, **trainer: Any) -> config.Config:
    return config.load({
        "base_model": str(base),
        "input_features": [{"name": "text"}],
        "output_features": [{"name": "answer"}],
        "prompt": {"template": "{text}\n"},
        "generation": {"max_new_tokens": 8},
        **({"adapter": dict(adapter)} if adapter is not None else {}),
        "execution": {"device": "cpu"},
        "trainer": STEPS | trainer,
    })  # fmt: skip


def answers(tuned: Any, **asked: Any) -> Answers:
    """Greedy answers to some rows, and how likely each of their tokens is."""
    found = tuned.predict(ASKED, probabilities=True, **asked)
    return found.texts, [list(each) for each in found.log_probabilities]


def same(one: Any, other: Any, within: float = 1e-5) -> None:
    assert one[0] == other[0]
    for found, wanted in zip(one[1], other[1], strict=True):
        assert found == pytest.approx(wanted, abs=within)


@pytest.fixture(scope="module")
def made(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """A run of each case, with what the process that trained it answers: tuned, and as the base that it began with."""
    before, root, out = torch.get_num_threads(), tmp_path_factory.mktemp("made"), {}
    torch.set_num_threads(1)
    try:
        for case, adapter in CASES.items():
            trained = pipeline.train(settings_of(bases(case), adapter | MERGED), ROWS, output=root / case)
            out[case] = Made(trained.folder, answers(trained.tuned), answers(trained.tuned, use_base=True))
    finally:
        torch.set_num_threads(before)
    return out


@pytest.fixture(scope="module")
def served(made: dict[str, Made]) -> dict[str, Any]:
    """What a new process answers with each run."""
    asked = json.dumps([{case: str(one.folder) for case, one in made.items()}, ASKED])
    found = subprocess.run([sys.executable, "-c", SERVE], input=asked, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_answers_as_the_one_that_trained(case: str, made: Any, served: Any) -> None:
    assert not isinstance(served[case], str), served[case]
    tuned, base = served[case]
    same(tuned, made[case].answers)
    same(base, made[case].of_base)
    assert tuned != base  # something was learned


@pytest.mark.parametrize("case", CASES)
def test_the_base_stays_what_it_was(case: str, made: Any, bases: Any) -> None:
    alone = pipeline.untuned(settings_of(bases(case), None))
    same(made[case].of_base, answers(alone))


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_answer_as_the_adapter_does(case: str, made: Any) -> None:
    whole = pipeline.untuned(settings_of(made[case].folder / "merged", None))
    same(answers(whole), made[case].answers, within=1e-3)


@pytest.mark.parametrize("case", [*KINDS, "dora", "pissa", "eva", "corda", "adalora, its biases"])
def test_going_on_begins_with_what_was_trained(case: str, made: Any, bases: Any, tmp_path: Path) -> None:
    adapter = {"type": CASES[case]["type"], "pretrained_adapter_weights": str(made[case].folder / "adapter")}
    more = pipeline.train(
        settings_of(bases(case), adapter, train_steps=1, learning_rate=1e-12), ROWS, output=tmp_path / "more"
    )
    same(answers(more.tuned), made[case].answers, within=1e-4)
    same(answers(pipeline.load(more.folder)), answers(more.tuned))


@pytest.mark.parametrize("case", KINDS)
def test_a_run_that_was_ended_goes_on_to_the_bit(case: str, made: Any, bases: Any, tmp_path: Path) -> None:
    def end(event: Any) -> None:
        if isinstance(event, Stepped) and event.split == "train" and event.step > 2:
            raise Ended

    settings = settings_of(bases(case), CASES[case] | MERGED, steps_per_checkpoint=1)
    with pytest.raises(Ended):
        pipeline.train(settings, ROWS, output=tmp_path / "run", sink=end)
    again = pipeline.train(settings, ROWS, output=tmp_path / "run")
    assert again.standing == "resumed"
    straight, gone_on = (
        folder / "adapter" / "adapter_model.safetensors" for folder in (made[case].folder, again.folder)
    )
    assert straight.read_bytes() == gone_on.read_bytes()


def test_another_rank_than_that_of_the_adapter_to_go_on_from_is_told(made: Any, bases: Any, tmp_path: Path) -> None:
    folder = made["lora"].folder / "adapter"
    section = {"type": "lora", "r": 16, "target_modules": ["q_proj"], "pretrained_adapter_weights": str(folder)}
    with pytest.raises(ConfigError, match="config-conflict") as caught:
        pipeline.train(settings_of(bases("lora"), section), ROWS, output=tmp_path / "more")
    told = {fault.where: fault for fault in caught.value.faults}
    assert told["adapter.r"].received == 16 and told["adapter.r"].allowed == "4"
    assert "up_proj" in told["adapter.target_modules"].allowed
