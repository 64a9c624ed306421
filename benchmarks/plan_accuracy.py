"""Is what the planner predicts what happens? Peak memory and step time of real training steps, as CSV.

python benchmarks/plan_accuracy.py                       the built-in cases, each in a process of its own
python benchmarks/plan_accuracy.py --calibration only    the runs that the constants of a card are fitted to
python benchmarks/plan_accuracy.py --cases cases.yaml    other ones: a list of mappings as in CASES
python benchmarks/plan_accuracy.py --only qlora-7b --out accuracy.csv

A case trains a Llama of the named shape with random weights for a few steps, through the code of `luthier train`: the
planner's plan, `pipeline.opening`, `train.loop.fit`. Nothing but Luthier is needed, no tokenizer and no network. A case
with `cap_gib` runs in a process that may take no more of the card. The prediction is that of `luthier plan` on
this machine, its probe included; `assumed_step_s` is the one before the probe. Peak memory on CUDA is
torch.cuda.max_memory_allocated from the first step on (with graphs, of steps that made no graph, outside the pool that
they keep for themselves, and all of that pool); on a CPU the process's peak resident set. The time of a step is the
median of the second half of the steps: a length that comes for the first time makes libraries load kernels.
``--together`` runs all cases in one process, which is shorter. The cases of CALIBRATION are there to fit
constants to, and marked so in the table; the gap between kernels was fitted to lora-360m, and moves `assumed_step_s`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

GIB = 2**30
QLORA = {"quantization": {"bits": 4}}
SEED = {"adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}}
FULL = {"adapter": None}
EAGER, GRAPHS = {"execution": {"graphs": False}}, {"execution": {"graphs": True}}

# name, shape of workload.SHAPES, rows of a step, tokens of a row (a number, or median and most), config; `shared`:
# tokens that all rows begin with; `steps`: instead of --steps.
CALIBRATION: list[dict[str, Any]] = [
    {"name": "cal-7b-seed", "shape": "7b", "config": QLORA | SEED},
    {"name": "cal-7b", "shape": "7b", "config": QLORA | EAGER},
    {
        "name": "cal-7b-4096",
        "shape": "7b",
        "batch": 2,
        "tokens": 4096,
        "config": QLORA | {"execution": {"weights": "quantised"}},
    },
    {"name": "cal-360m", "shape": "360m", "batch": 16, "tokens": [200, 512], "config": FULL},
    {"name": "cal-135m-1024", "shape": "135m", "batch": 16, "tokens": 1024, "config": {}, "steps": 40},
    {"name": "cal-7b-graphs", "shape": "7b", "tokens": 128, "config": QLORA | GRAPHS},
    {
        "name": "cal-1b-shared",
        "shape": "1b",
        "tokens": [250, 1024],
        "shared": 120,
        "config": {"execution": {"share_prefix": True}},
    },
    {
        "name": "cal-1b-unshared",
        "shape": "1b",
        "tokens": [250, 1024],
        "shared": 120,
        "config": {"execution": {"share_prefix": False}},
    },
]
CASES: list[dict[str, Any]] = [
    {"name": "qlora-7b-2048", "shape": "7b", "batch": 4, "tokens": 2048, "steps": 10, "config": QLORA},
    {"name": "qlora-7b-8192", "shape": "7b", "batch": 2, "tokens": 8192, "steps": 6, "config": QLORA},
    {"name": "lora-7b", "shape": "7b", "batch": 16, "tokens": [250, 1024], "config": {}},
    {"name": "qlora-7b-15gib-fp16", "shape": "7b", "batch": 16, "tokens": [250, 1024], "cap_gib": 15,
     "config": QLORA | {"trainer": {"precision": "fp16"}}},
    {"name": "qlora-7b-15gib-8192", "shape": "7b", "batch": 2, "tokens": 8192, "cap_gib": 15, "steps": 6,
     "config": QLORA},
    {"name": "qlora-7b-6gib", "shape": "7b", "batch": 16,
     "config": QLORA | SEED | {"execution": {"memory_limit": "6GiB"}}},
    {"name": "lora-1b", "shape": "1b", "batch": 32, "tokens": [400, 2048], "config": {}},
    {"name": "full-1b", "shape": "1b", "batch": 16, "tokens": [250, 1024], "config": FULL},
    {"name": "full-1b-host", "shape": "1b", "batch": 16, "tokens": [250, 1024],
     "config": FULL | {"execution": {"optimizer": "host"}}},
    {"name": "qlora-7b-tiles", "shape": "7b", "batch": 2, "tokens": 8192, "steps": 6,
     "config": QLORA | {"execution": {"mlp_tile": 1024, "recompute": "all", "weights": "quantised"}}},
    {"name": "lora-360m", "shape": "360m", "batch": 64, "tokens": [128, 512], "config": {}, "steps": 60},
    {"name": "full-360m-1024", "shape": "360m", "batch": 16, "tokens": 1024, "config": FULL},
    {"name": "lora-135m", "shape": "135m", "batch": 16, "config": SEED, "steps": 80},
    {"name": "full-135m-4096", "shape": "135m", "batch": 8, "tokens": 4096, "config": FULL},
    {"name": "qlora-1b-128", "shape": "1b", "batch": 16, "tokens": 128, "config": QLORA | SEED, "steps": 80},
    {"name": "generic-1b", "shape": "1b", "batch": 16, "tokens": [250, 1024],
     "config": {"execution": {"model": "generic"}}},
]  # fmt: skip
COLUMNS = [
    "case", "device", "calibration", "precision", "plan", "predicted_peak_gib", "measured_peak_gib", "peak_ratio",
    "predicted_step_s", "assumed_step_s", "probe_s", "measured_step_s", "step_ratio",
    "first_half_s", "tokens_per_s", "steps", "parts_ms",
]  # fmt: skip


@dataclass
class Steps:
    """A sink that keeps the seconds and tokens of each step, and forgets the memory of what came before."""

    device: str
    steps: int
    graphs: bool
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # with graphs: bytes of each step that made none
    made: int = 0  # graphs

    def __call__(self, event: Any) -> None:
        """Take what an event says of a training step."""
        from luthier.events import Progress, Stepped

        if isinstance(event, Progress) and event.stage == "train" and not self.seconds:
            _forget_peak(self.device)
        if isinstance(event, Stepped) and event.split == "train":
            if self.graphs:
                before, self.made = self.made, _Counted.made
                if before == self.made:  # while a graph is made, what its pool holds is counted too
                    total, alive = _pool()
                    self.peaks.append(_peak(self.device) - alive + total)
                _forget_peak(self.device)
            self.tokens.append(event.values["tokens"])
            self.seconds.append(event.values["tokens"] / event.values["tokens_per_s"])


class _Counted:
    """How many graphs were made since `begin`."""

    made = 0

    @staticmethod
    def begin() -> None:
        import torch

        plain = torch.cuda.graph

        class Graph(plain):  # type: ignore[misc, valid-type]
            def __enter__(self) -> None:
                _Counted.made += 1
                super().__enter__()

        if plain.__name__ != "Graph":
            torch.cuda.graph = Graph  # type: ignore[misc]


def run_case(case: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """One row of the table, made in this process. ``folder`` holds the model of the case."""
    from luthier import config
    from luthier.assets.spec import read_spec
    from luthier.data.share import shared_by_all
    from luthier.data.source import TableSource
    from luthier.objectives.sft import Sft
    from luthier.pipeline.opening import open_for_tuning
    from luthier.pipeline.probing import can_probe, probed
    from luthier.plan import plan_for, probe
    from luthier.plan.measure import cpu_rates
    from luthier.train.loop import fit
    from luthier.train.setup import Setup
    from luthier.types import Base, DataStats

    if "cap_gib" in case:
        _cap(case["cap_gib"])
    steps = case.get("steps", steps)
    trainer = {"batch_size": case["batch"], "train_steps": steps, "steps_per_evaluation": steps,
               "eval_generation_rows": 0}  # fmt: skip
    given = case.get("config", {})
    settings = config.load({"base_model": str(folder), **given, "trainer": {**given.get("trainer", {}), **trainer}})
    spec = read_spec(folder)
    examples = _examples(case, steps, spec.vocab)
    lengths = tuple(example.length for example in examples)
    supervised = sum(example.supervised for example in examples)
    stats = DataStats(lengths, supervised, "accuracy", shared_by_all(examples))
    machine = probe(settings.execution.device)
    planned = plan_for(settings, spec, stats, machine, measured=None if machine.gpus else cpu_rates())
    plan, precision = planned.plan, planned.job.precision
    kept = Steps(plan.device, steps, plan.graphs)
    if plan.graphs:
        _Counted.begin()
    base = Base(case["name"], folder, "folder", "", spec)
    started = time.perf_counter()
    told = probed(settings, base, planned) if can_probe(planned, base) else planned
    probe = time.perf_counter() - started
    if plan.device.startswith("cuda"):
        import torch

        torch._C._cuda_clearCublasWorkspaces()  # those of the probe's streams
        torch.cuda.empty_cache()
    model = open_for_tuning(settings, base, precision, plan, kept, steps=steps)
    with tempfile.TemporaryDirectory() as scratch:
        fit(
            Setup(
                model=model.module,
                logprobs=model.logprobs,
                objective=Sft(settings.trainer.loss_normalization),
                source=TableSource(examples, case["batch"], settings.random_seed, "accuracy"),
                plan=plan,
                trainer=settings.trainer,
                checkpoints=Path(scratch),
                precision=precision,
                sink=kept,
            )
        )
    return _row(case, planned, told, kept) | {"probe_s": round(probe, 1)}


def _row(case: dict[str, Any], planned: Any, told: Any, kept: Steps) -> dict[str, Any]:
    plan, cuda = planned.plan, planned.plan.device.startswith("cuda")
    wanted = planned.memory.peak if cuda else planned.memory.host_total
    peak = max(kept.peaks) if plan.graphs else _peak(plan.device)
    took = statistics.median(kept.seconds[len(kept.seconds) // 2 :])
    said = f"{plan.model} {plan.attention} {plan.weights} {plan.tokens_per_pass} recompute {plan.recompute_layers}"
    said += (
        " graphs" * plan.graphs
        + " shared" * plan.share_prefix
        + " offload" * plan.offload_checkpoints
        + f" chunk {plan.loss_chunk}"
    )
    said += " host-embeddings" * (plan.embeddings == "host") + " host-optimizer" * (plan.optimizer == "host")
    return {
        "case": case["name"],
        "device": planned.rates.name,
        "calibration": bool(case.get("calibration", False)),
        "precision": planned.job.precision,
        "plan": said,
        "predicted_peak_gib": round(wanted / GIB, 3),
        "measured_peak_gib": round(peak / GIB, 3),
        "peak_ratio": round(wanted / peak, 3),
        "predicted_step_s": round(told.speed.seconds, 4),
        "assumed_step_s": round(planned.speed.seconds, 4),
        "measured_step_s": round(took, 4),
        "step_ratio": round(told.speed.seconds / took, 3),
        "first_half_s": round(statistics.mean(kept.seconds[: len(kept.seconds) // 2]), 4),
        "parts_ms": " ".join(f"{name.replace(' ', '-')} {1000 * t:.1f}" for name, t in told.speed.parts.items() if t),
        "tokens_per_s": round(statistics.mean(kept.tokens) / took, 1),
        "steps": len(kept.seconds),
    }


def _examples(case: dict[str, Any], steps: int, vocab: int) -> list[Any]:
    """Random rows of the wanted lengths, the second half of each supervised; enough that no row comes twice."""
    from luthier.types import Example

    draw, wanted = random.Random(11), case["tokens"]
    shared = [draw.randrange(3, vocab) for _ in range(case.get("shared", 0))]
    out = []
    for row in range(case["batch"] * steps):
        length = wanted
        if isinstance(wanted, list):
            length = int(min(wanted[1], max(16, wanted[0] * draw.lognormvariate(0, 0.5))))
        length = max(length, len(shared) + 16)
        prompt = max(length // 2, len(shared))
        ids = [*shared, *(draw.randrange(3, vocab) for _ in range(length - len(shared)))]
        out.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt), row))
    return out


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _cap(gib: float) -> None:
    """Let this process have no more of the card."""
    import torch

    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)


def _pool() -> tuple[int, int]:
    """Bytes of the memory that graphs keep for themselves, and those in use."""
    import torch

    kept = [one for one in torch.cuda.memory_snapshot() if one.get("segment_pool_id", (0, 0)) != (0, 0)]
    return sum(one["total_size"] for one in kept), sum(one["allocated_size"] for one in kept)


def _peak(device: str) -> int:
    """Bytes."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_of(case: dict[str, Any], models: Path) -> Path:
    """The folder of the case's model, made when it is not there."""
    import torch
    from workload import make_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = case.get("layers")
    return make_model(models / f"{case['shape']}-{layers or 'all'}", case["shape"], device, layers)


def main() -> None:
    """Run the cases that were asked for, each in its own process, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, help="a YAML list of cases instead of the built-in ones")
    parser.add_argument("--calibration", choices=["only", "too"], help="the cases of CALIBRATION as well, or alone")
    parser.add_argument("--only", nargs="*", help="names of the cases to run")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "luthier-accuracy")
    parser.add_argument("--out", type=Path, help="where the CSV goes; stdout as well")
    parser.add_argument("--together", action="store_true", help="all cases in this process")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = json.loads(options.one)
        print("ROW " + json.dumps(run_case(case, model_of(case, options.models), options.steps)))
        return
    rows = []
    for case in _chosen(options):
        rows.append(_here(case, options) if options.together else _apart(case, options))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    streams = [sys.stdout] if options.out is None else [sys.stdout, options.out.open("w", newline="")]
    for stream in streams:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _chosen(options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [case | {"calibration": True} for case in CALIBRATION] if options.calibration else []
    cases += [] if options.calibration == "only" else CASES
    if options.cases:
        from ruamel.yaml import YAML

        cases = YAML(typ="safe", pure=True).load(options.cases)
    return [with_defaults(case) for case in cases if not options.only or case["name"] in options.only]


def with_defaults(case: dict[str, Any]) -> dict[str, Any]:
    """A case with the keys that may be left out."""
    return {"batch": 16, "tokens": [115, 512], "config": {}} | case


def _here(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case in this process, which forgets what the one before left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > 2**26:
            print(f"{left} bytes of the case before are still held", file=sys.stderr)
    try:
        return run_case(case, model_of(case, options.models), options.steps)
    except Exception as error:
        return {"case": case["name"], "plan": f"failed: {error!r}"[:300]}


def _apart(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case from a fresh process; a case that fails is a row that says how."""
    command = [sys.executable, __file__, "--one", json.dumps(case), "--steps", str(options.steps)]
    done = subprocess.run([*command, "--models", str(options.models)], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if found:
        row: dict[str, Any] = json.loads(found[-1].removeprefix("ROW "))
        return row
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"case": case["name"], "plan": f"failed: {last[:300]}"}


if __name__ == "__main__":
    main()
