"""Starts that are not drawn, through the pipeline: gone on with to the bit, forked, served as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import config, pipeline
from luthier.errors import ConfigError, LuthierError, RunError
from luthier.events import Event, Stepped
from luthier.pipeline import beginning
from luthier.run import RunFolder, sealed
from luthier.run.verify import verify
from luthier.train import checkpoint

STARTS = ("pissa_niter_2", "eva", "lora_ga")
PROMPTS = ["parcel 3 fast\n", "parcel 5 slow\n"]


class Ended(Exception):
    """What ends a run here."""


def end_after(step: int) -> Any:
    def sink(event: Event) -> None:
        if isinstance(event, Stepped) and event.split == "train" and event.step > step:
            raise Ended

    return sink


def weights(made: pipeline.Trained) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in made.tuned.model.module.named_parameters()}


@pytest.mark.parametrize("start", STARTS)
def test_a_run_goes_on_to_the_bit_and_is_loaded_as_it_was_trained(train, start: str) -> None:
    keys: dict[str, Any] = {"adapter__init_lora_weights": start, "adapter__r": 4, "trainer__steps_per_checkpoint": 1}
    straight = train("straight", **keys)
    with pytest.raises(Ended):
        train("halved", sink=end_after(2), **keys)
    halved = straight.folder.with_name("halved")
    assert checkpoint.steps_in(halved / "checkpoints")
    kept = (halved / "start.safetensors").read_bytes()
    again = train("halved", **keys)
    assert (halved / "start.safetensors").read_bytes() == kept
    for name, one in weights(straight).items():
        assert torch.equal(weights(again)[name], one), name
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (halved / "adapter" / file).read_bytes() == (straight.folder / "adapter" / file).read_bytes()
    want = straight.tuned.generate(PROMPTS)
    loaded = pipeline.load(straight.folder)
    assert loaded.generate(PROMPTS) == want
    with straight.tuned.model.base_only(), loaded.model.base_only():
        assert straight.tuned.generate(PROMPTS) == loaded.generate(PROMPTS)


def test_a_run_does_not_go_on_without_what_it_began_with(train) -> None:
    keys: dict[str, Any] = {"adapter__init_lora_weights": "pissa", "trainer__steps_per_checkpoint": 1}
    with pytest.raises(Ended):
        train("run", sink=end_after(2), **keys)
    made = train("other", **keys)
    (made.folder.with_name("run") / "start.safetensors").unlink()
    with pytest.raises(RunError, match="began with are gone") as gone:
        train("run", **keys)
    assert gone.value.code == "run-damaged"


def test_a_changed_bit_of_what_was_begun_with_is_found(train) -> None:
    made = train("run", adapter__init_lora_weights="pissa", trainer__steps_per_checkpoint=1)
    assert "start.safetensors" in [one.what for one in verify(RunFolder.load(made.folder)) if not one.faults]
    path = made.folder / "start.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert sealed.fault(path), place
    assert [one.what for one in verify(RunFolder.load(made.folder)) if one.faults] == ["start.safetensors"]


def test_a_run_does_not_go_on_from_what_has_changed(train) -> None:
    keys: dict[str, Any] = {"adapter__init_lora_weights": "pissa", "trainer__steps_per_checkpoint": 1}
    with pytest.raises(Ended):
        train("run", sink=end_after(2), **keys)
    path = train("other", **keys).folder.with_name("run") / "start.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(RunError, match="it has changed") as found:
        train("run", **keys)
    assert found.value.code == "run-damaged"


def test_a_fork_begins_with_the_factors_of_its_origin(settings, rows, tmp_path: Path) -> None:
    def run(output: str, start: str, seed: int, fork: Path | None = None, steps: int = 4) -> pipeline.Trained:
        made = config.load(settings, [f"adapter.init_lora_weights={start}", f"random_seed={seed}",
                                      f"trainer.train_steps={steps}"])  # fmt: skip
        return pipeline.train(made, rows, output=tmp_path / output, fork=fork)

    origin = run("origin", "lora_ga", 1)
    fork = run("fork", "lora_ga", 2, origin.folder)
    other = run("other", "lora_ga", 2)
    files = [(one.folder / "start.safetensors").read_bytes() for one in (origin, fork, other)]
    assert files[0] == files[1] != files[2]
    drawn = run("drawn", "default", 1)
    for begun, start in ((drawn.folder, "pissa"), (origin.folder, "default")):
        with pytest.raises(LuthierError):
            run(f"from-{start}", start, 1, begun)


def test_the_rows_are_the_first_of_the_runs_order(settings, rows) -> None:
    made = config.load(settings, ["adapter.init_lora_weights=eva", "adapter.init_rows=11", "execution.model=generic"])
    work = pipeline.prepare(made, rows)

    source = work.source()
    looked = beginning.first_rows(work.config, work.source())
    assert [one.row for one in looked] == [one.row for one in [*source.next_step(), *source.next_step()][:11]]
    trained = {at for at, split in enumerate(work.splits) if split == 0}
    assert {one.row for one in looked} <= trained
    drawn = config.load(settings)
    assert beginning.first_rows(drawn, work.source()) == []


@pytest.mark.parametrize(
    ("adapter", "more", "said"),
    [
        ({"init_lora_weights": "loftq"}, {}, "give `quantization`"),
        ({"init_lora_weights": "corda"}, {"quantization": {"bits": 4}}, "not quantised"),
        ({"init_lora_weights": "lora_ga"}, {"quantization": {"bits": 8}}, "not quantised"),
        ({"init_lora_weights": "loftq", "use_dora": True}, {"quantization": {"bits": 4}}, "use_dora"),
        ({"init_lora_weights": "eva", "corda_config": {"corda_method": "ipm"}}, {}, "corda_config has no effect"),
        ({"type": "adalora", "init_lora_weights": "pissa"}, {}, "a start of its own"),
    ],
)
def test_what_a_start_cannot_be_is_refused(settings, adapter, more, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        config.load({**settings, **more, "adapter": {"type": "lora", "r": 8, **adapter}})
    assert refused.value.code == "config-conflict"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:inner dimension")  # of the tiny base: bitsandbytes' slower product
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "eva", "corda", "lora_ga", "loftq"])
def test_a_start_on_a_gpu(train, start: str, bits: int | None) -> None:
    if (start == "loftq" and bits is None) or (start in ("corda", "lora_ga") and bits is not None):
        pytest.skip("refused")
    keys: dict[str, Any] = {"adapter__init_lora_weights": start, "adapter__r": 4, "execution__device": "cuda"}
    if bits is not None:
        keys["quantization__bits"] = bits
    made = train("run", trainer__epochs=4, **keys)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "validation"]
    assert losses[-1] < losses[0]
    want = made.tuned.generate(PROMPTS)
    loaded = pipeline.load(made.folder)
    assert next(loaded.model.module.parameters()).is_cuda and loaded.generate(PROMPTS) == want
