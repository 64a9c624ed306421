"""The mirror: two slots in turn, whole or not taken, a new machine goes on, and no failure of it stops training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from faulty_drive import Faulty
from luthier import config, console, pipeline
from luthier.errors import ConfigError, RunError
from luthier.events import Stepped, Warned
from luthier.run import mirror as mirrors
from luthier.run.mirror import Mirror
from luthier.train import checkpoint


class Crash(Exception):
    pass


@pytest.fixture
def work(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = ["question,answer", *(f"say {i},yes {i}" for i in range(20))]
    Path("rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    trainer = {"epochs": 4, "batch_size": 8, "precision": "fp32", "steps_per_checkpoint": 1, "eval_generation_rows": 0}
    settings = {
        "base_model": str(tiny_llama), "prompt": {"template": "{question}\n"}, "execution": {"device": "cpu"},
        "trainer": {**trainer, "early_stop": -1},
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def train(output: str, mirror: str | None = "mirror", crash_at: int = 0, events: list[Any] | None = None) -> None:
    def sink(event: Any) -> None:
        if events is not None:
            events.append(event)
        if isinstance(event, Stepped) and event.split == "train" and event.step == crash_at:
            raise Crash

    settings = config.load(Path("config.yaml"))
    if crash_at:
        with pytest.raises(Crash):
            pipeline.train(settings, "rows.csv", output=output, mirror=mirror, sink=sink)
    else:
        pipeline.train(settings, "rows.csv", output=output, mirror=mirror, sink=sink)


def same(one: str, other: str) -> bool:
    left, right = (checkpoint.load(Path(name) / "checkpoints", 8) for name in (one, other))
    assert left.state == right.state
    adapters = [(Path(name) / "adapter" / "manifest.json").read_bytes() for name in (one, other)]
    return adapters[0] == adapters[1] and all(torch.equal(left.weights[k], right.weights[k]) for k in left.weights)


@pytest.mark.parametrize("url", ["mirror", "memory://bucket/mirror"])  # a disk, and what is no file system at all
def test_a_new_machine_goes_on_from_it(work: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    train("straight", None)
    train("run", url, crash_at=6)
    shutil.rmtree("run")
    events: list[Any] = []
    train("run", url, events=events)
    assert any(f"taken from {url}" in getattr(event, "text", "") for event in events)
    first = min(event.step for event in events if isinstance(event, Stepped))
    assert first > 4 and same("run", "straight")
    assert not list(Path("run").rglob(".mirroring"))
    assert Path("mirror").exists() == (url == "mirror") != any("done.json" in name for name in MemoryFileSystem.store)
    shutil.rmtree("run")  # after its end the mirror holds the trained model too
    train("run", url)
    assert same("run", "straight")


def test_what_a_run_began_with_is_in_it(work: Path) -> None:
    path = Path("config.yaml")
    made = json.loads(path.read_text(encoding="utf-8"))
    made["adapter"] = {"type": "lora", "r": 4, "init_lora_weights": "pissa_niter_2"}
    path.write_text(json.dumps(made), encoding="utf-8")
    train("straight", None)
    train("run", crash_at=6)
    shutil.rmtree("run")
    train("run")
    assert same("run", "straight")


def test_a_drive_that_tears_and_loses_never_stops_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("straight", None)
    resumed = []
    for seed in range(6):
        where = work / f"mirror-{seed}"
        monkeypatch.setattr(mirrors, "_open", lambda url, seed=seed: (Faulty(0.1, seed), url))
        train(f"run-{seed}", str(where), crash_at=5 + seed % 3)
        shutil.rmtree(f"run-{seed}")
        events: list[Any] = []
        train(f"run-{seed}", str(where), events=events)
        assert same(f"run-{seed}", "straight")
        resumed.append(min(event.step for event in events if isinstance(event, Stepped)) > 1)
    assert all(resumed)


def test_a_mirror_that_is_gone_is_a_warning(work: Path) -> None:
    Path("mirror").write_text("a file where a folder should be")
    events: list[Any] = []
    train("run", events=events)
    told = [event.text for event in events if isinstance(event, Warned)]
    assert told and all("was not copied to the mirror" in text for text in told)


def test_what_its_address_is_entered_with_is_not_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://AKIAKEY01:canary-secret@bucket/x"

    class Refusing(Faulty):
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            raise PermissionError(f"403 for {url}?X-Amz-Signature=canary-signature, signed with canary-secret")

    monkeypatch.setattr(mirrors, "_open", lambda _: (Refusing(0, 0), str(work / "drive")))
    lines: list[str] = []
    pipeline.train(config.load(Path("config.yaml")), "rows.csv", output="run", mirror=url,
                   sink=console.PlainLog(lines.append))  # fmt: skip
    told = next(line for line in lines if "was not copied to the mirror s3://[credentials]@bucket/x: 403 for" in line)
    assert told.startswith("warning: ") and "signed with [credentials]" in told
    written = [one.read_text("utf-8", "replace") for one in Path("run").rglob("*") if one.is_file()]
    assert not any("canary" in text or "AKIAKEY01" in text for text in [*lines, *written])


def test_every_damage_is_found_and_the_other_slot_taken(work: Path) -> None:
    train("run", crash_at=6)
    steps = {}
    for slot in Path("mirror").iterdir():
        steps[json.loads((slot / "done.json").read_text())["step"]] = slot
    newest = steps[max(steps)]
    path = newest / "checkpoints" / f"step-{max(steps):06d}" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))
    told: list[Any] = []
    assert Mirror("mirror", told.append).restore(work / "new") == min(steps)
    assert "weights.safetensors is not as done.json says" in told[0].text
    path.unlink()
    (steps[min(steps)] / "done.json").write_text("{")
    assert Mirror("mirror", told.append).restore(work / "other") is None and not (work / "other").exists()


def test_paths_in_a_mirror_stay_inside_the_run(work: Path) -> None:
    train("run", crash_at=4)
    for name in ("../evil", "/tmp/evil", "a\\..\\evil", "checkpoints/../../evil", "C:evil"):
        for slot in Path("mirror").iterdir():
            done = json.loads((slot / "done.json").read_text())
            done["files"] = {name: {"sha256": "0", "bytes": 1}}
            (slot / "done.json").write_text(json.dumps(done))
        told: list[Any] = []
        assert Mirror("mirror", told.append).restore(work / "deep" / "new") is None
        assert "leads out of the run folder" in told[0].text
    assert not list(work.rglob("evil"))


def test_another_run_is_not_written_over(work: Path) -> None:
    train("run", crash_at=4)
    before = {path: path.read_bytes() for path in Path("mirror").rglob("*") if path.is_file()}
    path = Path("config.yaml")
    path.write_text(path.read_text().replace('"epochs": 4', '"epochs": 5'))
    with pytest.raises(RunError, match="another run"):
        (Path("other") / "checkpoints").mkdir(parents=True)
        (Path("other") / ".writing").touch()  # begun here: nothing is taken from the mirror
        (Path("other") / "checkpoints").rmdir()
        train("other")
    assert before == {path: path.read_bytes() for path in Path("mirror").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="named"):
        pipeline.train(config.load(Path("config.yaml")), "rows.csv", mirror="mirror")
