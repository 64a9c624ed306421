"""Steady-state training speed of the decoder: real tokens a second, milliseconds a step, peak memory.

    python benchmarks/train_speed.py --folder /tmp/llama7b --out results.csv

Each setting sees every step of an epoch once before it is timed, so that kernels are compiled and graphs are captured;
how long that took is a column of its own. Percentiles are over the steps of the next epoch.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from provenance import percentiles, provenance
from workload import make_model, samples

from luthier.config.adapter import Lora
from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.model.decoder.decoder import Decoder, Execution
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.plan.passes import EAGER, GRAPHED, ROUND
from luthier.types import Example, Plan

BATCH = 16
SEED = Lora(r=8, alpha=16, target_modules=("q_proj", "v_proj"))
ALL = Lora(r=16, alpha=32)


def step(decoder: Decoder, optimizer: torch.optim.Optimizer, rows: Sequence[Example], tokens: int, number: int) -> None:
    """One optimizer step, as `luthier.train.step` does it, without logging."""
    total = sum(sum(row.weights[1:]) for row in rows)
    plan = Plan("cuda", tokens, "decoder")
    for indices in schedule([row.length for row in rows], plan)[0]:
        batch = collate([rows[i] for i in indices], number)
        logprobs = decoder.logprobs(batch)
        weight = batch.target_weight[batch.supervised].to(logprobs.device, non_blocking=True)
        (-(logprobs * weight).sum() / total).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(
    name: str, folder: Path, adapter: Lora, how: Placing, execution: Execution, tokens: int, steps: int
) -> dict[str, object]:
    """One setting."""
    gc.collect()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    decoder = load_decoder(folder, read_shape(folder), how)
    torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    decoder.adapt(adapter, seed=1)
    decoder.execution = execution
    decoder.train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-4, fused=True)
    rows = samples()
    batches = [rows[i : i + BATCH] for i in range(0, len(rows) // BATCH * BATCH, BATCH)][:steps]
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        step(decoder, optimizer, batch, tokens, number)
        if number == 0:
            torch.cuda.synchronize()
            first = time.perf_counter() - started
    torch.cuda.synchronize()
    warm = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    started = time.perf_counter()
    marks[0].record()
    for number, batch in enumerate(batches):
        step(decoder, optimizer, batch, tokens, number)
        marks[number + 1].record()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    each = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    real = sum(row.length for batch in batches for row in batch)
    row = {
        "setting": name,
        "tokens_per_s": round(real / seconds),
        "ms_per_step": round(1000 * seconds / len(batches), 1),
        **percentiles(each),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "load_s": round(loaded, 1),
        "first_step_s": round(first, 1),
        "first_epoch_s": round(warm, 1),
        **provenance("torch", "triton"),
    }
    print("RESULT", *(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    """All settings, or those whose name holds --only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama7b"))
    parser.add_argument("--model", default="7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=28)
    given = parser.parse_args()
    make_model(given.folder, given.model)
    nf4 = {"dtype": torch.bfloat16, "device": "cuda", "quantised": "nf4"}
    flash = Execution("flash", loss_chunk=2048, multiple=EAGER[-1])  # as little padding as the plan of a long run has
    graphs = replace(flash, graphs=True, multiple=GRAPHED[-1])
    lean = {"multiple": ROUND, "recompute_layers": 32, "offload": True, "loss_chunk": 128}
    settings = [
        ("seed resident graphs", SEED, Placing(**nf4), graphs, 32768),
        ("seed resident", SEED, Placing(**nf4), flash, 32768),
        ("seed nf4 graphs", SEED, Placing(**nf4, weights="quantised"), graphs, 32768),
        ("all resident graphs", ALL, Placing(**nf4), graphs, 32768),
        ("all nf4 graphs", ALL, Placing(**nf4, weights="quantised"), graphs, 32768),
        ("all nf4", ALL, Placing(**nf4, weights="quantised"), flash, 32768),
        ("seed lean", SEED, Placing(**nf4, weights="quantised", embeddings="host"), Execution("flash", **lean), 512),
        ("seed streamed", SEED, Placing(**nf4, weights="streamed", embeddings="host"), Execution("flash", **lean), 512),
    ]
    found = []
    for name, adapter, how, execution, tokens in settings:
        if given.only and not any(word == name for word in given.only.split(",")):
            continue
        steps = given.steps if tokens > 512 else min(given.steps, 6)
        found.append(measure(name, given.folder, adapter, how, execution, tokens, steps))
    if given.out and found:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
