"""The machine as it is read, and the plan as a pure function of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

from luthier.plan import device_of, make_plan, probe
from luthier.plan.machine import _cgroup_memory, parse_gpus
from luthier.types import DataStats, Gpu, Machine, ModelSpec, Plan

GIB = 2**30
SPEC = ModelSpec("LlamaForCausalLM", 135_000_000, 30, 576, 1536, 9, 3, 64, 49152, 8192, True, "bfloat16")
CPU = Machine(2, 16 * GIB, 14 * GIB)
GPU = Machine(8, 64 * GIB, 60 * GIB, (Gpu("a", 8 * GIB, GIB), Gpu("b", 24 * GIB, 23 * GIB, (8, 6))))
STATS = DataStats((40, 120), 50, "hash")


def config(checkpointing: bool = False, adapter: object = "lora") -> SimpleNamespace:
    trainer = SimpleNamespace(enable_gradient_checkpointing=checkpointing)
    return SimpleNamespace(trainer=trainer, quantization=None, adapter=adapter)


def test_a_cpu_takes_small_passes() -> None:
    plan = make_plan(config(), SPEC, STATS, CPU)
    assert (plan.device, plan.tokens_per_pass, plan.checkpointing) == ("cpu", 512, False)
    assert set(plan.reasons) == {"device", "tokens_per_pass", "recompute_layers"}
    assert plan == make_plan(config(), SPEC, STATS, CPU)


def test_the_longest_example_always_fits_into_a_pass() -> None:
    plan = make_plan(config(), SPEC, DataStats((3000,), 50, "hash"), CPU)
    assert plan.tokens_per_pass >= 3000


def test_the_gpu_with_most_free_memory_is_used() -> None:
    assert device_of(GPU) == "cuda:1" and make_plan(config(), SPEC, STATS, GPU).tokens_per_pass > 512
    assert device_of(Machine(8, GIB, GIB, (Gpu("m", GIB, GIB, None, "mps"),))) == "mps"


def test_checkpointing_is_declared_or_forced_by_memory() -> None:
    assert make_plan(config(checkpointing=True), SPEC, STATS, CPU).checkpointing
    tight = replace(CPU, free_memory=3 * GIB)
    plan = make_plan(config(), SPEC, DataStats((4000,), 50, "hash"), tight)
    assert plan.checkpointing and "would not fit" in plan.reasons["recompute_layers"]
    nothing = make_plan(config(adapter=None), SPEC, STATS, replace(CPU, free_memory=GIB))
    assert "may run out" in nothing.reasons["tokens_per_pass"] and nothing.tokens_per_pass == 120


def test_gpus_are_read_from_nvidia_smi() -> None:
    gpus = parse_gpus("NVIDIA H100, 81559, 81008, 9.0\nTesla T4, 15360, 15000, 7.5\nbroken\nX, [N/A], 1, 2\n")
    assert [g.name for g in gpus] == ["NVIDIA H100", "Tesla T4"]
    assert gpus[1].memory == 15360 * 2**20 and gpus[0].capability == (9, 0)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _cgroup_memory(tmp_path) == (0, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert _cgroup_memory(tmp_path) == (1000, 400)
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_memory(tmp_path) == (0, 0)


def test_this_machine() -> None:
    machine = probe()
    assert machine.cores >= 1 and 0 < machine.free_memory <= machine.memory


def test_a_recorded_plan_is_read_back() -> None:
    plan = make_plan(config(checkpointing=True), SPEC, STATS, CPU)
    assert Plan.from_json(asdict(plan) | {"of a later version": 1}) == plan
    old = Plan.from_json({"device": "cpu", "tokens_per_pass": 512, "checkpointing": True, "reasons": {}})
    assert old.checkpointing and old.tokens_per_pass == 512
