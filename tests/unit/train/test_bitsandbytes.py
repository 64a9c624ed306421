"""bitsandbytes on a GPU: 8-bit and paged optimizer states, and a whole run on an 8-bit base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import config, pipeline
from luthier.config.optimizer import Optimizer as Declared
from luthier.train.optimizer import build_optimizer

pytestmark = pytest.mark.gpu
# Each with the optimizer whose update it approximates or, where its state is only paged, repeats: bitsandbytes' adam
# decays weights as adamw does (adam's own way is 2 % off after these steps).
KINDS = {
    "adam_8bit": "adamw", "adamw_8bit": "adamw", "lion_8bit": "lion", "paged_adam": "adamw", "paged_adamw": "adamw",
    "paged_adam_8bit": "adamw", "paged_adamw_8bit": "adamw", "paged_lion_8bit": "lion",
}  # fmt: skip
SHAPE = (256, 64)  # bitsandbytes keeps the state of fewer than 4,096 weights in 32 bit


def start() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).cuda())


def made(weight: torch.nn.Parameter, kind: str) -> torch.optim.Optimizer:
    return build_optimizer([("w", weight)], Declared(type=kind, weight_decay=0.01), 1e-2, "cuda")


def run(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        draw = torch.Generator().manual_seed(number)
        weight.grad = (torch.randn(SHAPE, generator=draw) + 0.5).cuda()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_32_bits_nearly_and_goes_on_from_a_checkpoint(kind: str) -> None:
    plain, kept = start(), start()
    run(plain, made(plain, KINDS[kind]), range(10))
    optimizer = made(kept, kind)
    run(kept, optimizer, range(5))
    states = [value for value in optimizer.state[kept].values() if getattr(value, "shape", None) == SHAPE]
    assert states and all((value.dtype == torch.uint8) == ("8bit" in kind) for value in states)

    again = torch.nn.Parameter(kept.detach().clone())
    resumed = made(again, kind)
    resumed.load_state_dict(optimizer.state_dict())
    run(kept, optimizer, range(5, 10))
    run(again, resumed, range(5, 10))
    assert torch.equal(kept, again)

    wanted, got = (weight.detach() - start().detach() for weight in (plain, kept))
    off = ((got - wanted).norm() / wanted.norm()).item()
    assert off < (0.1 if "8bit" in kind else 1e-3), off


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, wide enough for the blocks of 64 weights that bitsandbytes multiplies by."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("base") / "wide"))
    shape = AutoConfig.from_pretrained(folder)
    shape.hidden_size, shape.intermediate_size, shape.head_dim = 64, 128, 16
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model", ["generic", "auto"])
def test_a_run_on_a_quantised_base_learns_and_answers(base: Path, tmp_path: Path, bits: int, model: str) -> None:
    rows = [{"question": f"say {i}", "answer": "yes", "split": 0 if i < 32 else 1} for i in range(40)]

    def losses(name: str, **changes: Any) -> tuple[pipeline.Trained, list[float]]:
        made = config.load(
            {
                "base_model": str(base),
                "prompt": {"template": "{question}\n"},
                "input_features": [{"name": "question"}],
                "output_features": [{"name": "answer"}],
                "generation": {"max_new_tokens": 4},
                **changes,
                "trainer": {
                    "epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "eval_generation_rows": 0,
                    **changes.get("trainer", {}),
                },
            }
        )  # fmt: skip
        trained = pipeline.train(made, rows, output=tmp_path / name)
        assert json.loads((tmp_path / name / "plan.json").read_text())["device"].startswith("cuda")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return trained, [line["loss"] for line in lines if line["split"] == "validation"]

    _, plain = losses("plain")
    trained, found = losses(
        "quantised",
        quantization={"bits": bits},
        execution={"model": model},
        trainer={"optimizer": {"type": "paged_adamw_8bit"}},
    )
    assert found[0] - found[-1] > 0.9 * (plain[0] - plain[-1]) > 0.05, (plain, found)
    assert found[-1] == pytest.approx(plain[-1], abs=0.05)
    there = trained.tuned.predict(rows[32:]).texts
    assert pipeline.load(tmp_path / "quantised").predict(rows[32:]).texts == there
