"""What a run serves is what it trained: a changed, swapped, added or missing file is refused before it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from luthier import config, events, pipeline
from luthier.api import LudwigModel, Model, Models
from luthier.assets import cache
from luthier.cli import runs
from luthier.errors import ConfigError, RunError
from luthier.export import hub
from luthier.pipeline import unchanged
from luthier.pipeline.loading import find
from luthier.run import RunFolder, manifest
from luthier.run.verify import RECORDED

ASKED = [{"text": "parcel 3 fast"}]
WEIGHTS = "adapter_model.safetensors"
TRAINER = {"train_steps": 1, "batch_size": 8, "learning_rate": 0.01, "precision": "fp32", "eval_generation_rows": 0}


@pytest.fixture(scope="module")
def kept(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `other`, of another seed, and `whole`, which trained all weights."""
    root = tmp_path_factory.mktemp("unchanged")
    for name, seed in (("one", 1), ("other", 2), ("whole", 1)):
        settings = config.load({
            "base_model": str(tiny_llama), "prompt": {"template": "{text}\n"}, "generation": {"max_new_tokens": 4},
            "input_features": [{"name": "text"}], "output_features": [{"name": "answer"}], "random_seed": seed,
            "trainer": TRAINER, "execution": {"device": "cpu"},
            "adapter": {"type": "lora", "r": 4} if name != "whole" else None,
        })  # fmt: skip
        pipeline.train(settings, [{"text": f"parcel {i}", "answer": f"a {i}"} for i in range(16)], output=root / name)
    return root


@pytest.fixture
def made(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "runs")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(known | {"lora_alpha": 64}), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


CHANGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a byte": ("one", WEIGHTS, lambda root: flip(root / "one/adapter" / WEIGHTS)),
    "its config": ("one", "adapter_config.json", lambda root: edit(root / "one/adapter/adapter_config.json")),
    "gone": ("one", WEIGHTS, lambda root: (root / "one/adapter" / WEIGHTS).unlink()),
    "weights of another": ("one", WEIGHTS, lambda root: copy(root / "other/adapter" / WEIGHTS, root / "one/adapter")),
    "all of another": ("one", "manifest.json", lambda root: copy(root / "other/adapter", root / "one/adapter")),
    "no manifest": ("one", "manifest.json", lambda root: (root / "one/adapter/manifest.json").unlink()),
    "weights beside it": ("one", "weights/", lambda root: copy(root / "whole/weights", root / "one/weights")),
    "a byte of all": ("whole", "model.safetensors", lambda root: flip(root / "whole/weights/model.safetensors")),
    "one more": (
        "whole",
        "more.safetensors",
        lambda root: copy(root / "whole/weights/model.safetensors", root / "whole/weights/more.safetensors"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_not_served(change: str, made: Path) -> None:
    run, named, do = CHANGES[change]
    before = pipeline.load(made / run).predict(ASKED).texts
    do(made)
    with pytest.raises(RunError) as caught:
        pipeline.load(made / run)
    assert caught.value.code == "run-damaged" and named in str(caught.value)
    assert "restore" in str(caught.value) and f"runs verify {made / run}" in str(caught.value)
    assert len(before) == 1


def test_every_way_to_load_a_run_looks(made: Path) -> None:
    flip(made / "one/adapter" / WEIGHTS)
    for load in (Model.load, LudwigModel.load, lambda path: Models.load([made / "other", path])):
        with pytest.raises(RunError, match=WEIGHTS):
            load(str(made / "one"))
    settings = config.load(made / "other/config.yaml")
    section = {"type": "lora", "pretrained_adapter_weights": str(made / "one/adapter")}
    with pytest.raises(RunError, match=WEIGHTS):
        pipeline.train(config.load(settings.to_dict() | {"adapter": section}), ASKED, output=made / "more")


@pytest.mark.parametrize("named", ["one", "one/adapter", "one/model"])
def test_a_run_that_has_changed_is_not_uploaded(made: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Path] = []
    monkeypatch.setattr(hub, "upload", lambda folder, *_, **__: sent.append(Path(folder)) or "address")
    assert LudwigModel.upload_to_hf_hub("me/model", str(made / named)) == "address"
    assert sent == [made / "one/adapter"]
    copy(made / "other/adapter", made / "one/adapter")  # whole, and of another run
    with pytest.raises(RunError, match="not that of this run") as caught:
        LudwigModel.upload_to_hf_hub("me/model", str(made / named))
    assert caught.value.code == "run-damaged" and len(sent) == 1


def test_a_copied_run_and_a_saved_model_are_served(made: Path) -> None:
    moved = shutil.copytree(made / "one", made / "moved")
    (moved / "adapter/README.md").write_text("# Mine\n", encoding="utf-8")  # the card is for people to edit
    want = pipeline.load(made / "one").predict(ASKED).texts
    assert pipeline.load(moved).predict(ASKED).texts == want
    saved = pipeline.load(moved).save(made / "saved")
    assert pipeline.load(saved).predict(ASKED).texts == want


def test_a_run_of_a_version_without_sums_is_served_and_told(made: Path) -> None:
    (made / "one/adapter" / manifest.NAME).unlink()
    record = json.loads((made / "one/run.json").read_text(encoding="utf-8"))
    assert record.pop(RECORDED)
    (made / "one/run.json").write_text(json.dumps(record), encoding="utf-8")
    told: list[Any] = []
    assert pipeline.load(made / "one", sink=told.append).predict(ASKED).texts
    assert any("whether it has changed is not known" in getattr(one, "text", "") for one in told)


def test_large_files_are_hashed_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(made / "cache"))
    monkeypatch.setattr(unchanged, "LARGE", 0)
    hashed: list[str] = []
    plain = cache.file_hash
    monkeypatch.setattr(cache, "file_hash", lambda path: (hashed.append(path.name), plain(path))[1])
    run = RunFolder.load(made / "whole")
    for _ in range(2):
        unchanged.require_unchanged(run)
        assert hashed.count("model.safetensors") == 1
    flip(run.weights / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors"):
        unchanged.require_unchanged(run)


def test_verify_knows_a_model_of_another_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy(made / "other/adapter", made / "one/adapter")
    with pytest.raises(typer.Exit):
        runs.command([Path("verify"), made / "one"])
    assert "not that of this run" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("alpha", 64), ("use_rslora", True), ("r", 8)])
def test_a_config_of_another_adapter_is_refused(made: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"adapter.{key} of") as caught:
        pipeline.load(made / "one", overrides=[f"adapter.{key}={json.dumps(value)}"])
    assert caught.value.code == "config-conflict"
    path = made / "one/config.yaml"
    known = config.load(path).to_dict()
    known["adapter"][key] = value
    path.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(ConfigError, match="not the adapter that was trained"):
        pipeline.load(made / "one")


def rewrite(path: Path, **sections: Any) -> None:
    path.write_text(json.dumps(config.load(path).to_dict() | sections), encoding="utf-8")


SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def test_a_config_of_other_positions_is_refused(made: Path) -> None:
    scaling = f"model_parameters={json.dumps(SCALED)}"
    with pytest.raises(ConfigError, match=r"model_parameters\.rope_scaling of") as caught:
        pipeline.load(made / "one", overrides=[scaling])
    assert caught.value.code == "config-conflict" and caught.value.faults[0].allowed == "None"
    rewrite(made / "whole/config.yaml", model_parameters=SCALED)
    with pytest.raises(ConfigError, match="not the model that was trained"):
        pipeline.load(made / "whole")


def test_a_base_that_is_held_otherwise_is_told_with_the_difference(made: Path) -> None:
    told: list[Any] = []
    find(made / "one", sink=told.append)
    assert not told
    rewrite(made / "one/config.yaml", quantization={"bits": 4})
    find(made / "one", sink=told.append)
    (one,) = [event.text for event in told if isinstance(event, events.Warned)]
    assert "quantization was (none) and is (" in one and "bits: 4" in one


def test_prompts_that_are_written_otherwise_are_told(made: Path) -> None:
    told: list[Any] = []
    pipeline.load(made / "one", sink=told.append)
    assert not any("not written as in the training" in getattr(one, "text", "") for one in told)
    pipeline.load(made / "one", overrides=['prompt.template="Q: {text}"'], sink=told.append)
    assert any("not written as in the training" in getattr(one, "text", "") for one in told)


def warned(run: Path, *overrides: str) -> list[str]:
    heard: list[Any] = []
    pipeline.load(run, overrides=overrides, sink=heard.append)
    return [event.text for event in heard if isinstance(event, events.Warned)]


@pytest.mark.parametrize(
    "override",
    ["trainer.learning_rate=1", "dataset=x.csv", "model_parameters.neftune_noise_alpha=5",
     "preprocessing.truncation=drop", "preprocessing.max_sequence_length=64", "prompt.train_on=all",
     "adapter.dropout=0.5"],
)  # fmt: skip
def test_an_override_that_changes_no_answer_is_told_and_nothing_else(made: Path, override: str) -> None:
    (told,) = warned(made / "one", override)
    keys, _, acting = told.partition(": of no effect")
    assert override.partition("=")[0] in keys.split(", ") and "generation" in acting


def test_a_seed_acts_where_answers_are_drawn(made: Path) -> None:
    (told,) = warned(made / "one", "random_seed=7")
    assert "random_seed" in told and "greedy" in told
    assert warned(made / "one", "random_seed=7", "generation.temperature=0.5") == []


@pytest.mark.parametrize(
    "override", ["generation.max_new_tokens=2", "trainer.eval_batch_size=2", "execution.device=cpu", "random_seed=1"]
)
def test_an_override_that_acts_or_changes_nothing_is_not_told(made: Path, override: str) -> None:
    assert warned(made / "one", override) == []


def test_an_override_does_not_move_rows_between_training_and_evaluation(made: Path, tmp_path: Path) -> None:
    rows = [{"text": f"parcel {i}", "answer": f"a {i}"} for i in range(16)]
    plain, other = (pipeline.load(made / "one", overrides=sets) for sets in ([], ["random_seed=7"]))
    assert [one.evaluate(rows, shots=0).rows for one in (other,)] == [plain.evaluate(rows, shots=0).rows]
