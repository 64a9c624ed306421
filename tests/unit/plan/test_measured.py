"""What is predicted against what is there: sizes of real tensors while a tiny Llama takes a real step on this CPU."""

from __future__ import annotations

import importlib
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live

from luthier import config
from luthier.assets.spec import read_spec
from luthier.data.collate import collate
from luthier.model import adapters
from luthier.model.decoder.decoder import Execution
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.model.generic import GenericModel
from luthier.model.load import DTYPES, load_base
from luthier.plan.job import Job
from luthier.plan.memory import Memory, memory
from luthier.plan.speed import rates_of, speed
from luthier.train.precision import autocast
from luthier.types import Base, DataStats, Example, Machine, Plan

LAYERS = 4
CPU = Machine(2, 2**34, 2**34, cpu_bf16=True)
# name -> hidden, inner, heads, key heads, head size, vocabulary; and the rows of a pass
SHAPES: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "wide": ((256, 704, 4, 4, 64, 1024), [128] * 4),
    "words": ((96, 256, 3, 1, 32, 4096), [50, 90, 33, 70, 120, 64]),
}
ADAPTERS: dict[str, Any] = {
    "lora": {"type": "lora", "r": 4},
    "lora qv": {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    "full": None,
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder with a random Llama of one of the shapes, and the lengths of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (hidden, inner, heads, kv, size, vocab), lengths = SHAPES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    made = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=size, tie_word_embeddings=False,
        max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM._from_config(made, dtype=torch.bfloat16).save_pretrained(folder)
    return folder, lengths


def step_bytes(logprobs: Any, batch: Any, context: Any) -> int:
    """The most that a forward and backward pass held beyond what was there before."""
    with Live() as live:
        with context:
            found = logprobs(batch)
        (-(found * batch.target_weight[batch.target_weight != 0]).sum()).backward()
    return live.peak


def measured(folder: Path, settings: config.Config, precision: str, plan: Plan, lengths: list[int]) -> int:
    """Run one step by the plan."""
    rows = [
        Example([1 + i % 300 for i in range(n // 2)] + [1 + row] * (n - n // 2),
                [0.0] * (n // 2) + [1.0] * (n - n // 2), row)
        for row, n in enumerate(lengths)
    ]  # fmt: skip
    full = settings.adapter is None
    if plan.model == "decoder":
        model = load_decoder(folder, read_shape(folder), Placing(dtype=DTYPES[precision], trained=full))
        if not full:
            model.adapt(settings.adapter, 1)
        model.execution = Execution(
            recompute_layers=plan.recompute_layers, loss_chunk=plan.loss_chunk, mlp_tile=plan.mlp_tile
        )
        return step_bytes(model.train().logprobs, collate(rows, share=plan.share_prefix), nullcontext())
    base = Base("tiny", folder, "folder", "", read_spec(folder))
    loaded: Any = load_base(base, dtype="fp32" if full else precision)
    loaded = loaded.requires_grad_(True) if full else adapters.add_adapter(loaded, settings.adapter, seed=1)
    model = GenericModel(loaded.train(), checkpointing=plan.checkpointing)
    return step_bytes(model.logprobs, collate(rows), autocast(precision, "cpu"))  # type: ignore[arg-type]


def predicted(folder: Path, settings: config.Config, plan: Plan, lengths: list[int]) -> tuple[Memory, float]:
    """The forecast, and the largest moment of a pass in it."""
    stats = DataStats(tuple(lengths), sum(lengths) // 2, "hash", min(lengths) // 2 if plan.share_prefix else 0)
    job = Job.of(settings, read_spec(folder), stats, CPU)
    found = memory(job, plan, job.most(plan.model, plan.share_prefix))
    elsewhere = ("update", "evaluation", "generation")
    return found, max(size for name, size in found.moments.items() if name not in elsewhere)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("model", "recomputed", "band"),
    [("decoder", 0, 0.1), ("decoder", 2, 0.1), ("decoder", LAYERS, 0.1), ("generic", 0, 0.2), ("generic", LAYERS, 0.2)],
)
def test_peak_of_a_step(
    case: tuple[Path, list[int]], adapter: str, precision: str, model: Any, recomputed: int, band: float
) -> None:
    folder, lengths = case
    settings = config.load(
        {"base_model": str(folder), "adapter": ADAPTERS[adapter], "trainer": {"batch_size": 8, "precision": precision}}
    )
    plan = Plan("cpu", 4096, model, recompute_layers=recomputed, loss_chunk=64)
    there = measured(folder, settings, precision, plan, lengths)
    found, want = predicted(folder, settings, plan, lengths)
    assert want == pytest.approx(there, rel=band), {name: round(size) for name, size in found.moments.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_peak_of_a_step_of_vera(case: tuple[Path, list[int]], precision: str, recomputed: int) -> None:
    """Whose factors are wide, frozen and of all layers: they have no gradients and no state, but they are there."""
    folder, lengths = case
    declared = {"base_model": str(folder), "adapter": {"type": "vera"}}
    settings = config.load(declared | {"trainer": {"batch_size": 8, "precision": precision}})
    plan = Plan("cpu", 4096, "generic", recompute_layers=recomputed)
    there = measured(folder, settings, precision, plan, lengths)
    found, want = predicted(folder, settings, plan, lengths)
    assert want == pytest.approx(there, rel=0.2), {name: round(size) for name, size in found.moments.items()}
    base = Base("tiny", folder, "folder", "", read_spec(folder))
    tuned: Any = adapters.add_adapter(load_base(base, dtype=precision), settings.adapter, seed=1)
    trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    shared = sum(held["default"].numel() for held in (tuned.base_model.vera_A, tuned.base_model.vera_B))
    assert found.device["adapter"] == (4 if precision == "fp32" else 6) * (trained + shared)
    assert found.device["gradients"] == 4 * trained and found.device["optimizer"] == 8 * trained


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_peak_of_a_step_that_shares_a_beginning(case: tuple[Path, list[int]], adapter: str, recomputed: int) -> None:
    folder, lengths = case[0], [length + 80 for length in case[1]]
    declared = {"base_model": str(folder), "adapter": ADAPTERS[adapter]}
    settings = config.load(declared | {"trainer": {"batch_size": 8, "precision": "fp32"}})
    plan = Plan("cpu", 4096, "decoder", recompute_layers=recomputed, loss_chunk=64, share_prefix=True)
    there = measured(folder, settings, "fp32", plan, lengths)
    found, want = predicted(folder, settings, plan, lengths)
    assert want == pytest.approx(there, rel=0.1), {name: round(size) for name, size in found.moments.items()}
    assert there < 0.95 * measured(folder, settings, "fp32", replace(plan, share_prefix=False), lengths)


@pytest.mark.parametrize("adapter", ["lora", "lora qv"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recomputed", [0, LAYERS])
def test_peak_of_a_step_in_tiles(case: tuple[Path, list[int]], adapter: str, precision: str, recomputed: int) -> None:
    folder, lengths = case
    declared = {"base_model": str(folder), "adapter": ADAPTERS[adapter]}
    settings = config.load(declared | {"trainer": {"batch_size": 8, "precision": precision}})
    plan = Plan("cpu", 4096, "decoder", recompute_layers=recomputed, loss_chunk=64, mlp_tile=64)
    there = measured(folder, settings, precision, plan, lengths)
    found, want = predicted(folder, settings, plan, lengths)
    assert want == pytest.approx(there, rel=0.1), {name: round(size) for name, size in found.moments.items()}
    loss = max(found.moments.values()) == found.moments["loss"]  # which tiles of feed-forward layers do not touch
    assert there < 0.9 * measured(folder, settings, precision, replace(plan, mlp_tile=0), lengths) or loss


def test_weights_adapter_and_gradients_are_exact(case: tuple[Path, list[int]]) -> None:
    folder, lengths = case
    for name, section in ADAPTERS.items():
        settings = config.load(
            {"base_model": str(folder), "adapter": section, "trainer": {"batch_size": 8, "precision": "fp32"}}
        )
        model = load_decoder(folder, read_shape(folder), Placing(dtype=torch.float32, trained=section is None))
        if section is not None:
            model.adapt(settings.adapter, 1)
        trained = sum(weight.numel() for weight in model.parameters())
        found, _ = predicted(folder, settings, Plan("cpu", 4096, "decoder"), lengths)
        assert found.device["gradients"] == 4 * trained, name
        assert found.device["optimizer"] == 8 * trained, name
        assert found.device["weights"] == 4 * read_spec(folder).parameters, name
        assert found.device["adapter"] == (0 if section is None else 4 * trained), name


@pytest.mark.alone
def test_time_of_a_pass_on_one_core(tmp_path: Path) -> None:
    """Within a factor of 2.5 of the processor time of a real pass: so small a model is not what it was fitted to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                       num_attention_heads=6, num_key_value_heads=6)  # fmt: skip
    LlamaForCausalLM._from_config(made, dtype=torch.float32).save_pretrained(tmp_path)
    settings = config.load({"base_model": str(tmp_path), "trainer": {"batch_size": 4, "precision": "fp32"}})
    lengths = [128] * 4
    stats = DataStats(tuple(lengths), sum(lengths) // 2, "hash")
    job = Job.of(settings, read_spec(tmp_path), stats, CPU)
    plan = Plan("cpu", 4096, "decoder", loss_chunk=64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_decoder(tmp_path, read_shape(tmp_path), Placing(dtype=torch.float32))
        model.adapt(settings.adapter, 1)
        rows = [Example([1 + i % 300 for i in range(n)], [0.0] * (n // 2) + [1.0] * (n - n // 2), 0) for n in lengths]
        took = min(_pass_seconds(model.train(), collate(rows)) for _ in range(3))
        square = torch.ones(512, 512)
        started = time.process_time()
        for _ in range(8):
            square @ square
        fp32 = 8 * 2.0 * 512**3 / (time.process_time() - started)
    finally:
        torch.set_num_threads(before)
    rates = rates_of(replace(CPU, cores=1), "cpu", "fp32", (fp32, fp32))
    assert took / 2.5 < speed(job, plan, rates).seconds < took * 2.5


def _pass_seconds(model: Any, batch: Any) -> float:
    started = time.process_time()
    (-(model.logprobs(batch) * batch.target_weight[batch.target_weight != 0]).sum()).backward()
    return time.process_time() - started


def test_the_benchmark_of_accuracy_runs_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).resolve().parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(str(path))
    module = importlib.import_module("plan_accuracy")
    made = importlib.import_module("workload")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    monkeypatch.setitem(made.SHAPES, "small", small)
    monkeypatch.setattr(made, "VOCAB", 128)
    case = {"name": "small", "shape": "small", "batch": 4, "tokens": [20, 40], "config": {}}
    row = module.run_case(case, module.model_of(case, tmp_path), steps=4)
    assert set(row) == set(module.COLUMNS) and row["steps"] == 4
    assert all(row[name] > 0 for name in ("predicted_peak_gib", "measured_peak_gib", "measured_step_s", "tokens_per_s"))
    assert len({one["name"] for one in module.CASES}) == len(module.CASES) >= 8
