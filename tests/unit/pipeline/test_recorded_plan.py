"""The plan of a run through the pipeline: written, executed as recorded on a resume, re-planned when it must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier import config, events, pipeline
from luthier.errors import Interrupted
from luthier.run import RunFolder


def declared(base: Path, **execution: object) -> config.Config:
    trainer = {"train_steps": 1, "batch_size": 4, "eval_generation_rows": 0}
    return config.load({"base_model": str(base), "trainer": trainer, "execution": execution})


def plans(settings: config.Config, table: list[dict[str, str]], folder: Path, *, stop: bool) -> list[events.Planned]:
    """Train, and return what was planned; ``stop`` interrupts when training begins."""
    seen: list[events.Planned] = []

    def sink(event: events.Event) -> None:
        if isinstance(event, events.Planned):
            seen.append(event)
        if stop and isinstance(event, events.Stage) and event.name == "load":
            raise KeyboardInterrupt

    try:
        pipeline.train(settings, table, output=folder, sink=sink)
    except Interrupted:
        assert stop
    return seen


@pytest.fixture
def table() -> list[dict[str, str]]:
    return [{"instruction": f"say {i}", "output": f"number {i}"} for i in range(12)]


def test_a_resumed_run_executes_its_recorded_plan(tiny_llama: Path, tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    (first,) = plans(declared(tiny_llama), table, folder, stop=True)
    recorded = json.loads((folder / "plan.json").read_text()) | {"tokens_per_pass": 9_999}
    assert first.plan["tokens_per_pass"] != 9_999 and first.why == ""
    (folder / "plan.json").write_text(json.dumps(recorded))
    (second,) = plans(declared(tiny_llama), table, folder, stop=False)
    assert second.plan["tokens_per_pass"] == 9_999 and second.why == ""
    run = RunFolder.load(folder)
    assert run.state == "finished" and "replanned" not in run.record


def test_a_changed_pin_is_a_new_plan_and_is_recorded(tiny_llama: Path, tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    plans(declared(tiny_llama), table, folder, stop=True)
    (second,) = plans(declared(tiny_llama, recompute="all"), table, folder, stop=True)
    assert second.plan["recompute_layers"] == 2 and "execution.recompute" in second.why
    (entry,) = RunFolder.load(folder, trained=False).record["replanned"]
    assert entry["why"] == second.why and entry["plan"]["recompute_layers"] == 2
    (third,) = plans(declared(tiny_llama, recompute="all"), table, folder, stop=False)
    assert third.why == "" and third.plan["recompute_layers"] == 2
    assert json.loads((folder / "plan.json").read_text())["recompute_layers"] == 2
