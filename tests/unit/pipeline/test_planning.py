"""`luthier plan`: seconds, no weights, no torch; other machines, budgets, sweeps; what it says when nothing fits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier import events, pipeline
from luthier.assets import sketch as sketches
from luthier.assets.shapes import known_shape
from luthier.cli import app
from luthier.config import load
from luthier.errors import AssetError, ConfigError, TrainingError
from luthier.pipeline import planning, probing
from luthier.pipeline.space import Space
from luthier.plan import make_plan
from luthier.plan.cards import card_named, imagined
from luthier.plan.estimate import duration, money, price_of, seconds_of

LLAMA = "meta-llama/Llama-2-7b-hf"


def write(tmp_path: Path, **sections: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"base_model": LLAMA, "quantization": {"bits": 4}} | sections))
    return path


def table(tmp_path: Path, rows: int = 40) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"instruction": "add " + "one " * (i % 9), "output": str(i) * 3}) for i in range(rows)]
    path.write_text("\n".join(lines))
    return path


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"])
    if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout)


def test_what_a_base_asks_for_is_said_with_its_plan(tmp_path: Path, tiny_llama: Path) -> None:
    """Gated and licence-bound bases, on the list and off it; of a permissive one nothing is said."""
    gated = run(write(tmp_path, base_model="meta-llama/Llama-3.2-1B-Instruct"), "--gpu", "T4")[1]["notes"]
    assert any("GATED" in note and "hf auth login" in note for note in gated)
    own = Path(shutil.copytree(tiny_llama, tmp_path / "own"))
    (own / "README.md").write_text("---\nlicense: llama2\n---\n")
    bound = run(write(tmp_path, base_model=str(own)), "--dataset", table(tmp_path), "--gpu", "T4")[1]["notes"]
    heard = ["prompt: 'instruction', learned: 'output'"]  # what else people are told, after it
    assert bound[:2] == [f"{own}: LICENCE-BOUND (llama2): read its terms at {own / 'README.md'}", *heard]
    free = run(write(tmp_path, base_model=str(tiny_llama)), "--dataset", table(tmp_path), "--gpu", "T4")[1]["notes"]
    assert free[:1] == heard


def test_a_model_that_is_not_here_is_planned_for_a_card_that_is_not_here(tmp_path: Path) -> None:
    code, said = run(write(tmp_path), "--gpu", "T4", "--price", "0.35/h", "--budget", "30m")
    assert code == 0 and said["fits"] and said["plan"]["reasons"]["model"]
    memory = said["memory"]
    assert {"weights", "adapter", "gradients", "optimizer", "activations", "loss", "evaluation", "generation"} <= set(
        memory["device"]
    )
    assert memory["total"] == memory["peak"] + memory["context"] <= memory["room"] < 15 * 2**30
    assert memory["host_total"] <= memory["host_room"] < 12 * 2**30  # a free notebook has that much
    assert said["time"]["calibrated"] is False and said["time"]["total"]["low"] < said["time"]["total"]["high"]
    assert said["cost"]["high"] == pytest.approx(said["time"]["total"]["high"] / 3600 * 0.35)
    assert said["download"] == 2 * known_shape(LLAMA).parameters  # type: ignore[union-attr]
    answers = said["generation"]["prediction"]
    assert answers["fits"] and answers["longest"] == 256 + 256 and answers["cache_bytes_per_token"] > 0
    assert 1 <= said["generation"]["evaluation"]["rows"] <= answers["rows"] <= 256
    items = ("weights", "adapter", "cache", "scores", "reading")
    assert answers["memory"]["total"] == sum(answers["memory"][name] for name in items) <= answers["memory"]["room"]
    assert said["affordable"]["rows"] > 0 and said["affordable"]["longest"] == 256
    assert any("no dataset" in note for note in said["notes"])


def test_lengths_of_a_sample_whose_prompt_the_template_makes_are_guessed(tmp_path: Path) -> None:
    """Without the tokenizer as with it: the rows that are used, of the columns that the template names."""
    features = {"input_features": [{"name": "prompt"}], "output_features": [{"name": "output"}]}
    path = write(tmp_path, prompt={"template": "{instruction}"}, preprocessing={"sample_size": 20}, **features)
    code, said = run(path, "--dataset", table(tmp_path), "--gpu", "T4")
    assert code == 0 and any("a random sample of 20 of 40 rows" in note for note in said["notes"])


@pytest.mark.parametrize(("free", "enough"), [(200, True), (14, False)])
def test_the_disk_has_to_hold_the_download_and_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
) -> None:
    """Of a base that is not here both are counted; in 14 GiB either would have room alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**30))
    path = write(tmp_path, adapter={"type": "lora", "r": 64})
    said = run(path, "--gpu", "A100")[1]
    space = said["space"]
    assert space["enough"] is enough and space["free"]["run"] == free * 2**30
    assert space["download"] == said["download"] > 12 * 2**30 and space["run"] == said["disk"] > 2**30
    shown = CliRunner().invoke(app, ["plan", str(path), "--gpu", "A100"], env={"COLUMNS": "200"}).stdout
    assert "for the base" in shown and ("NOT ENOUGH" in shown) is not enough
    apart = Space(12 * 2**30, 2**30, (14 * 2**30, 2 * 2**30), shared=False)
    assert apart.enough and not replace(apart, shared=True).enough and not replace(apart, run=2 * 2**30).enough


def test_a_base_that_is_here_needs_no_disk(tmp_path: Path, tiny_llama: Path) -> None:
    path = write(tmp_path, base_model=str(tiny_llama), quantization=None)
    assert run(path, "--gpu", "T4")[1]["space"]["download"] == 0


def test_the_data_is_measured_with_the_models_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    settings = load(write(tmp_path, base_model=str(tiny_llama), quantization=None))
    need = planning.need_of(settings, str(table(tmp_path)))
    work = pipeline.prepare(settings, str(table(tmp_path)))
    assert need.stats == work.prepared.stats and need.notes == () and need.base.download == 0
    machine = imagined(card_named("A100"))
    planned = planning.estimate_of(need, machine).planned.plan
    assert planned == make_plan(work.config, work.base.spec, work.prepared.stats, machine)


@pytest.mark.parametrize("known", ["its data", "no data", "no tokenizer"])
def test_a_model_that_the_decoder_refuses_is_planned_as_it_will_be_run(
    known: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "biased"
    shutil.copytree(tiny_llama, folder)
    stated = json.loads((folder / "config.json").read_text()) | {"mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(stated))
    if known == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    settings = load(write(tmp_path, base_model=str(folder), quantization=None))
    need = planning.need_of(settings, None if known == "no data" else str(table(tmp_path)))
    assert any("guessed" in note for note in need.notes) == (known == "no tokenizer")
    found = planning.estimate_of(need, imagined(card_named("A100"))).planned.plan
    assert found.model == "generic" and "mlp_bias" in found.reasons["model"]


def test_a_known_shape_says_what_the_decoder_refuses_of_it(tmp_path: Path) -> None:
    _, said = run(write(tmp_path, base_model="microsoft/Phi-4-mini-instruct"), "--gpu", "A100")
    assert said["plan"]["model"] == "generic" and "longrope" in said["plan"]["reasons"]["model"]
    assert run(write(tmp_path), "--gpu", "A100")[1]["plan"]["model"] == "decoder"


def test_without_a_tokenizer_lengths_are_guessed_and_said_to_be(tmp_path: Path) -> None:
    code, said = run(write(tmp_path), "--dataset", table(tmp_path), "--gpu", "A100")
    assert code == 0 and said["rows"] == 32 and "guessed" in said["notes"][0]


def test_this_machines_cpu_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path, base_model=str(tiny_llama), quantization=None)
    code, said = run(path, "--dataset", table(tmp_path), "--cpu", "--no-probe")
    assert said["plan"]["reasons"]["device"] == "asked for with --cpu"
    assert code == 0 and said["plan"]["device"] == "cpu" and said["time"]["source"] == "probe of this CPU"
    code, probed = run(path, "--dataset", table(tmp_path), "--cpu")
    assert code == 0 and probed["time"]["source"] == "a probe: this base on this machine"
    assert (
        probed["time"]["calibrated"] and probed["generation"]["prediction"]["source"] == "probe of this CPU"
    )  # no answers were made
    assert probed["plan"] == said["plan"] and probed["memory"]["device"] == said["memory"]["device"]


def test_what_cannot_fit_ends_with_the_code_of_no_memory_and_says_what_would(tmp_path: Path) -> None:
    path = write(tmp_path, adapter=None, quantization=None)
    code, said = run(path, "--gpu", "T4")
    assert code == 6 and not said["fits"] and said["memory"]["total"] > said["memory"]["room"]
    assert any("bits: 4" in remedy["change"] for remedy in said["remedies"])


def test_the_sweep_has_every_card(tmp_path: Path) -> None:
    _, said = run(write(tmp_path), "--memory", "15GiB", "--sweep")
    names = [one["gpu"] for one in said["sweep"]]
    assert {"T4", "L4", "A100", "H200"} <= set(names)
    slow, fast = (next(one for one in said["sweep"] if one["gpu"] == name) for name in ("T4", "H200"))
    assert fast["time"]["step"]["seconds"] < slow["time"]["step"]["seconds"]


def test_a_card_that_refuses_is_a_row_that_says_why(tmp_path: Path) -> None:
    """Pins stay where a card can do what they say; what belongs to one machine is left out, and said to be."""
    pins = {"attention": "flash", "device": "cuda", "memory_limit": "3GiB"}
    path = write(tmp_path, execution=pins)
    _, said = run(path, "--gpu", "A100", "--sweep")
    rows = {one["gpu"]: one for one in said["sweep"]}
    assert not rows["T4"]["fits"] and "flash" in rows["T4"]["refused"] and "compute capability" in rows["T4"]["refused"]
    assert rows["A100"]["fits"] and rows["A100"]["plan"]["attention"] == "flash"
    assert any("execution.memory_limit: 3GiB and execution.device: cuda" in note for note in said["notes"])
    bf16 = write(tmp_path, trainer={"precision": "bf16"})
    rows = {one["gpu"]: one for one in run(bf16, "--gpu", "A100", "--sweep")[1]["sweep"]}
    assert "bf16" in rows["V100"]["refused"] and rows["L4"]["plan"]


def test_a_sweep_goes_on_where_this_machine_refuses(tmp_path: Path) -> None:
    path = write(tmp_path, execution={"attention": "flash"})
    _, said = run(path, "--gpu", "T4", "--sweep")
    assert said["refused"][0]["where"] == "execution.attention" and any(one["fits"] for one in said["sweep"])
    done = CliRunner().invoke(app, ["plan", str(path), "--gpu", "T4", "--sweep", "--price", "1"])
    assert done.exit_code == 0 and done.stdout.startswith("refused here: `execution.attention: flash` cannot work")
    assert "H200" in done.stdout and "refused" in done.stdout
    with pytest.raises(ConfigError, match="flash"):
        run(path, "--gpu", "T4")
    nowhere = write(tmp_path, execution={"recompute": 99})
    with pytest.raises(ConfigError, match="the model has 32 layers"):
        run(nowhere, "--gpu", "T4", "--sweep")


def test_a_card_that_was_timed_gives_points_and_every_other_one_ranges(tmp_path: Path) -> None:
    path = write(tmp_path)
    shown = {gpu: CliRunner().invoke(app, ["plan", str(path), "--gpu", gpu]).stdout for gpu in ("A10", "H200")}
    cells = {gpu: [line.split("│") for line in text.splitlines()] for gpu, text in shown.items()}
    for what in ("a step", "speed", "an epoch", "in all", "tokens a second", "of one row alone", "first token"):
        said = {
            gpu: next(one[2] for one in all_of if one[1:] and one[1].strip() == what) for gpu, all_of in cells.items()
        }
        assert " to " in said["A10"] and " to " not in said["H200"], what
    assert "A10 is not calibrated" in shown["A10"] and "train_speed_h200.csv" in shown["H200"]


def test_a_sweep_does_not_wait_for_a_probe_of_this_machine(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "refined", lambda *given: pytest.fail("probed"))
    path = write(tmp_path, base_model=str(tiny_llama), quantization=None)
    _, said = run(path, "--dataset", table(tmp_path), "--sweep")
    assert said["sweep"] and not said["time"]["source"].startswith("a probe")


def test_people_see_the_verdict_first(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(write(tmp_path)), "--gpu", "4090", "--sweep", "--price", "1"])
    assert done.exit_code == 0 and done.stdout.startswith("fits on RTX 4090")
    assert "not calibrated" in done.stdout and "recompute_layers" in done.stdout
    assert "rows at once" in done.stdout and "cache of a token" in done.stdout and "tokens a second" in done.stdout


def test_a_reserve_that_takes_all_memory_is_told_and_nothing_is_negative(tmp_path: Path) -> None:
    path = write(tmp_path)
    done = CliRunner().invoke(app, ["plan", str(path), "--memory", "200MiB"], env={"COLUMNS": "200"})
    assert done.exit_code == 6
    assert "all of the 0.20 GiB that is free is the reserve" in done.stdout and "left free as a reserve" in done.stdout
    assert not re.search(r"-\d", done.stdout) and "nothing is left: DOES NOT FIT" in done.stdout


def test_what_is_printed_is_true_and_whole(tmp_path: Path, tiny_llama: Path) -> None:
    def said(*options: str, **sections: object) -> str:
        path = write(tmp_path, **sections)
        return " ".join(CliRunner().invoke(app, ["plan", str(path), *options], env={"COLUMNS": "200"}).stdout.split())

    small = said("--memory", "4GiB", quantization=None)
    assert small.startswith("fits on unknown GPU") and "0.00 GiB" not in small
    assert "GiB: DOES NOT FIT" in small  # predicting with 7B in 4 GiB: its weights are streamed in training alone
    assert "the host is assumed to have 32.0 GiB" in small and "compute capability 8.0 is assumed" in small
    full = said("--gpu", "A100", quantization=None, adapter=None)
    assert "of 76.4 GiB; the host needs 102.4 GiB of 27.9 GiB" in full  # both lack
    for gpu, precision, why in (("T4", "fp16", "bf16 needs compute"), ("L4", "bf16", "the hardware has it")):
        assert f"│ precision │ {precision} │ {why}" in said("--gpu", gpu)
    assert "│ precision │ fp32 │ set in trainer:" in said("--gpu", "L4", trainer={"precision": "fp32"})
    assert "│ prediction │ evaluation │" in said("--gpu", "L4").replace("┃", "│")
    assert "evaluation ┃" not in said("--gpu", "L4", trainer={"eval_generation_rows": 0})
    every = {
        "preprocessing": {"split": {"probabilities": [1, 0, 0]}},
        "quantization": None,
        "base_model": str(tiny_llama),
    }
    alone = said("--gpu", "L4", "--dataset", str(table(tmp_path)), **every)
    assert "none: no row validates" in alone and "evaluation ┃" not in alone


def test_layers_that_the_base_has_not_are_told_before_training(tmp_path: Path, tiny_llama: Path) -> None:
    path = write(
        tmp_path, base_model=str(tiny_llama), quantization=None, adapter={"type": "lora", "target_modules": ["nope"]}
    )
    with pytest.raises(AssetError, match="named 'nope'"):
        run(path, "--gpu", "L4")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gpu", "T44"), "did you mean 'T4'"),
        (("--gpu", "RTX 6000 Ada"), "Or give its memory instead"),
        (("--gpu", ""), "no GPU named ''"),
        (("--memory", "much"), "15GiB"),
        (("--memory", "0"), "in no memory"),
        (("--memory", "15"), "15 bytes are less than any GPU has"),
        (("--set", "execution.memory_limit=abc"), "text like 12GiB"),
        (("--gpu", "T4", "--memory", "200GiB"), "the T4 has less memory"),
        (("--gpu", "T4", "--set", "execution.device=cpu"), "`execution.device: cpu` contradicts --gpu"),
        (("--cpu", "--gpu", "T4"), "contradicts"),
        (("--budget", "soon"), "no duration"),
        (("--price", "cheap"), "no price"),
        (("--gpu", "T4", "--set", "execution.attention=flash"), "compute capability|flash|pads"),
    ],
)
def test_bad_options_are_explained(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(write(tmp_path), *options)


def test_a_model_nobody_knows_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="list of known shapes") as caught:
        run(write(tmp_path, base_model="nobody/nothing"), "--gpu", "T4")
    assert caught.value.code == "asset-not-found"


def test_the_hubs_metadata_serves_when_the_hub_can_be_reached(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    small = tmp_path / "small"
    small.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((tiny_llama / name).read_bytes())
    metadata = SimpleNamespace(parameter_count={"BF16": 30_000, "F32": 10})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repository: metadata)
    monkeypatch.setattr(sketches, "_snapshot", lambda repository, online: small if online else None)
    found = sketches.sketch("owner/model")
    assert (found.spec.parameters, found.spec.layers, found.spec.dtype) == (30_010, 2, "bfloat16")
    assert found.folder == small and found.download == 60_040


def test_durations_and_prices() -> None:
    assert seconds_of("1h30m") == 5400 and seconds_of("90s") == 90 and seconds_of("0.5h") == 1800
    assert price_of("0.35/h") == price_of("$0.35") == 0.35
    assert [duration(s) for s in (0.05, 10, 600, 36000)] == ["50 ms", "10.0 s", "10 min", "10.0 h"]
    assert [money(of) for of in (0, 0.00012345, 0.05, 1.234, 20)] == ["0.00", "0.00012", "0.050", "1.23", "20.00"]


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path)
    code = (
        "import sys; from luthier.cli import app\n"
        f"try: app(['plan', {str(path)!r}, '--gpu', 'T4', '--sweep', '--json'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.strip().endswith("[]"), done.stderr


def test_a_probe_that_does_not_fit_leaves_the_range(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise TrainingError("training-no-memory", "out of memory in step 1 with one sample a pass")

    monkeypatch.setattr(probing, "probed", full)
    settings = load(write(tmp_path, base_model=str(tiny_llama), quantization=None))
    machine, measured = planning.here(settings)
    found = planning.estimate_of(planning.need_of(settings, str(table(tmp_path))), machine, measured=measured)
    heard: list[events.Event] = []
    assert planning.refined(found, heard.append) is found
    assert any(isinstance(event, events.Warned) and "out of memory" in event.text for event in heard)
