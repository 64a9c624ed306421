"""Two ranks give what one gives: real processes over gloo, the whole pipeline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from safetensors.torch import load_file

from luthier.run import read_metrics

WORKER, GRADIENTS = Path(__file__).with_name("worker.py"), Path(__file__).with_name("gradients.py")
Ran = tuple[Path, list[tuple[str, float]], list[list[int]]]


def launched(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program on so many ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def settings(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": f"parcel {i} {'slow ' * (i % 4)}", "label": "late" if i % 3 == 0 else "early",
         "split": 0 if i < 41 else 1 if i < 44 else 2}
        for i in range(48)
    ]  # fmt: skip
    made = {
        "base_model": str(tiny_llama),
        "input_features": [{"name": "text"}],
        "output_features": [{"name": "label", "type": "category"}],
        "prompt": {"template": "Say whether this came late: {text}\n"},
        "generation": {"max_new_tokens": 4},
        "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
        "trainer": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32",
                    "optimizer": {"type": "sgd"}, "eval_generation_rows": 2, "steps_per_checkpoint": 2},
    }  # fmt: skip
    # the last step has one row: a rank without work
    path = tmp_path_factory.mktemp("settings") / "settings.json"
    path.write_text(json.dumps({"config": made, "rows": rows}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ran(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """Train on so many ranks, in a folder of the name; what came out."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, ranks: int, *stop: str, made: Path = settings) -> Ran:
        done = launched(ranks, str(WORKER), str(made), str(root / name), *stop)
        assert done.returncode == 0, done.stderr[-3000:]
        steps: dict[int, list[int]] = {}
        for rank in range(ranks):
            for number, rows in json.loads((root / f"{name}-{ranks}-{rank}.json").read_text(encoding="utf-8")):
                steps.setdefault(number, []).extend(rows)
        lines = [(line["split"], line["loss"]) for line in read_metrics(root / name / "metrics.jsonl")]
        return root / name, lines, [sorted(steps[number]) for number in sorted(steps)]

    return run


@pytest.fixture(scope="module")
def alone(ran: Callable[..., Ran]) -> Ran:
    return ran("alone", 1)


def same(found: Ran, want: Ran, within: float = 1e-6) -> None:
    assert [split for split, _ in found[1]] == [split for split, _ in want[1]]
    for (_, loss), (_, wanted) in zip(found[1], want[1], strict=True):
        assert loss == pytest.approx(wanted, abs=within)
    weights, wanted_weights = (result(one[0]) for one in (found, want))
    assert weights.keys() == wanted_weights.keys()
    assert max(float((weights[name] - wanted_weights[name]).abs().max()) for name in weights) < 1e-6
    learned = {name: one for name, one in weights.items() if "lora_B" in name}
    assert not learned or max(float(one.abs().max()) for one in learned.values()) > 1e-4


def result(run: Path) -> dict[str, torch.Tensor]:
    """The adapter that a run made, or all its weights."""
    adapter = run / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run / "weights" / "model.safetensors")


def all_weights(settings: Path, folder: Path) -> Path:
    """The settings of `settings` with every weight trained."""
    made = json.loads(settings.read_text(encoding="utf-8"))
    made["config"]["adapter"] = None
    path = folder / "full.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


@pytest.mark.parametrize(("trained", "architecture"), [("adapter", "llama"), ("full", "gemma2")])
def test_gradients_of_two_ranks_are_those_of_one_in_fp64(
    trained: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma has four norms of one size in a layer: in another order on another rank they would be mixed up."""
    unit, found = WORKER.parents[1], {}
    paths = [str(unit), str(unit / "model" / "decoder"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    make(tmp_path / "base", architecture)
    for ranks in (1, 2):
        done = launched(ranks, str(GRADIENTS), str(tmp_path / "base"), str(tmp_path / f"{ranks}.safetensors"), trained)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = load_file(tmp_path / f"{ranks}.safetensors")
    assert found[1].pop("passes") > found[2].pop("passes") > 0  # each rank runs a part of them
    assert found[1].keys() == found[2].keys()
    for name, one in found[1].items():
        two = found[2][name]
        assert one.dtype == two.dtype == torch.float64 and bool(one.any())
        assert float((one - two).norm() / one.norm()) < 1e-10, name


def test_two_ranks_give_what_one_gives(ran: Callable[..., Ran], alone: Ran) -> None:
    found = ran("two", 2)
    same(found, alone)
    assert found[2] == alone[2]
    first, second = (json.loads((found[0].parent / f"two-2-{rank}.json").read_text()) for rank in range(2))
    assert [len(rows) for _, rows in first] == [4] * 5 + [1]
    assert [len(rows) for _, rows in second] == [4] * 5  # the last step has no row for it
    assert json.loads((found[0] / "run.json").read_text(encoding="utf-8"))["state"] == "finished"


@pytest.mark.parametrize("adapter", [
    {"type": "loha", "r": 4, "rank_dropout": 0.3},
    {"type": "adalora", "dropout": 0.3, "target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 1, "orth_reg_weight": 5.0},
], ids=["loha", "adalora"])  # fmt: skip
def test_ranks_of_the_generic_path_drop_and_pull_the_same(
    ran: Callable[..., Ran], settings: Path, tmp_path: Path, adapter: dict[str, object]
) -> None:
    """AdaLoRA adds a term of the weights alone, once a step whatever the number of ranks."""
    made = json.loads(settings.read_text(encoding="utf-8"))
    made["config"]["adapter"] = adapter
    path, name = tmp_path / "settings.json", "-".join(map(str, adapter))
    path.write_text(json.dumps(made), encoding="utf-8")
    same(ran(f"{name}-two", 2, made=path), ran(f"{name}-one", 1, made=path))


def test_ranks_begin_with_the_same_factors(ran: Callable[..., Ran], settings: Path, tmp_path: Path) -> None:
    """One looks at the rows and keeps what it made of them, the other reads it."""
    made = json.loads(settings.read_text(encoding="utf-8"))
    made["config"]["adapter"] = {"type": "lora", "r": 4, "init_lora_weights": "lora_ga"}
    path = tmp_path / "lora_ga.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    one, two = ran("one-start", 1, made=path), ran("two-start", 2, made=path)
    same(two, one, within=5e-6)  # a loss of about 5 in fp32, of products that cancel
    kept = [(found[0] / "start.safetensors").read_bytes() for found in (one, two)]
    assert kept[0] == kept[1]


def test_two_ranks_give_what_one_gives_where_all_weights_are_trained(
    ran: Callable[..., Ran], settings: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    path = all_weights(settings, tmp_path)
    one, two = ran("one-full", 1, made=path), ran("two-full", 2, made=path)
    same(two, one)
    before, after = load_file(tiny_llama / "model.safetensors"), result(one[0])
    norms = [name for name in after if "norm" in name]
    assert norms and all(float((after[name] - before[name]).abs().max()) > 1e-6 for name in norms)  # they learned too


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives_where_all_weights_are_trained(
    ran: Callable[..., Ran], settings: Path, tmp_path: Path
) -> None:
    path = all_weights(settings, tmp_path)
    same(ran("gpus-full", 2, made=path), ran("gpu-full", 1, made=path), within=5e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives(ran: Callable[..., Ran], alone: Ran) -> None:
    """Over NCCL; a loss of about 5 in fp32, its sums in another order."""
    found = ran("gpus", 2)
    same(found, alone, within=5e-6)
    assert found[2] == alone[2]
    assert json.loads((found[0] / "plan.json").read_text(encoding="utf-8"))["device"].startswith("cuda")


def test_a_signal_to_one_rank_ends_all_and_another_number_of_ranks_goes_on(ran: Callable[..., Ran], alone: Ran) -> None:
    folder, _, before = ran("mixed", 2, "stop", "2")
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "interrupted"
    found = ran("mixed", 1)
    same(found, alone)
    assert before + found[2] == alone[2]


@pytest.mark.parametrize("told", [1, 2])
def test_a_signal_while_rank_0_evaluates_ends_all_soon(ran: Callable[..., Ran], alone: Ran, told: int) -> None:
    """Whether the other rank gets it alone, which waits for rank 0, or both at once."""
    name = f"asleep-{told}"
    folder, _, before = ran(name, 2, "asleep", str(told))
    sent = max(float(one.read_text()) for one in folder.parent.glob(f"{name}-told-*"))
    ended = [float((folder.parent / f"{name}-ended-{rank}").read_text()) for rank in range(2)]
    assert max(ended) - sent < 5.0  # of an evaluation of 100 s; half a second where nothing else runs
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "interrupted" and list((folder / "checkpoints").glob("step-*"))
    found = ran(name, 1)
    same(found, alone)
    assert before == alone[2] and found[2] == []  # all steps were taken; the evaluation was made again


def test_all_ranks_take_a_leaner_plan_when_one_has_no_memory(ran: Callable[..., Ran], alone: Ran) -> None:
    found = ran("tight", 2, "full", "3")
    same(found, alone)
    record = json.loads((found[0] / "run.json").read_text(encoding="utf-8"))
    assert [one["why"] for one in record["replanned"]] == ["out of memory in step 1"] * len(record["replanned"])


def test_the_command_line_under_torchrun(settings: Path, tmp_path: Path) -> None:
    """`torchrun … $(which luthier) train`: one run folder, one voice."""
    given = json.loads(settings.read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(json.dumps(given["config"]), encoding="utf-8")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, given["rows"])), encoding="utf-8")
    script = Path(sys.executable).with_name("luthier")
    command = [str(script), "train", str(tmp_path / "config.yaml"), "--dataset", str(tmp_path / "data.jsonl")]
    done = launched(2, *command, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained: ") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7  # six steps and an evaluation
    wrong = launched(2, *command, "--set", "trainer.epochs=0")
    assert wrong.returncode != 0
    assert wrong.stderr.count("error [config-") == 1


def test_a_failure_of_all_ranks_is_told_by_the_first_and_one_of_another_alone_by_itself(tmp_path: Path) -> None:
    """However late rank 0 is: torchrun ends it as soon as another has ended."""
    program = tmp_path / "fail.py"
    program.write_text(
        "import os, sys, time\n"
        "import luthier.cli.common as common\n"
        "from luthier import cli\n"
        "from luthier.errors import ConfigError\n"
        "rank, alone = int(os.environ['RANK']), sys.argv[1] == 'alone'\n"
        "common.FIRST_SPEAKS = 1.0 if alone else 60.0\n"
        "def fail(*given, **named):\n"
        "    time.sleep(0 if rank else 600 if alone else 2)\n"
        "    raise ConfigError('config-conflict', f'rank {rank} failed')\n"
        "cli.app = fail\n"
        "cli.main()\n",
        encoding="utf-8",
    )
    for how, wanted in (("all", "rank 0 failed"), ("alone", "rank 1 failed")):
        failed = launched(2, str(program), how)
        assert failed.returncode != 0
        told = [line for line in failed.stderr.splitlines() if "error [" in line]
        assert told == [f"error [config-conflict] {wanted}"]


def test_a_rank_that_is_gone_is_told_by_those_that_wait_for_it(tmp_path: Path) -> None:
    program = tmp_path / "gone.py"
    program.write_text(
        "import os\n"
        "import torch\n"
        "from luthier.errors import TrainingError\n"
        "from luthier.parallel import connect\n"
        "with connect() as comm:\n"
        "    comm.barrier()\n"
        "    if comm.rank:\n"
        "        os._exit(1)\n"
        "    try:\n"
        "        comm.sum(torch.ones(1))\n"
        "    except TrainingError as error:\n"
        "        print(error.code, flush=True)\n"
        "        os._exit(0)\n",
        encoding="utf-8",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program)], env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said[0].strip() == "training-rank-lost"
