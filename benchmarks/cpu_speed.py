"""Training on a CPU with the built-in model: Luthier's planned passes, and the plain transformers and PEFT loop.

    python benchmarks/cpu_speed.py                     each contestant in a process of its own, the better of two

64 samples, about 7,000 tokens, the second half of each supervised; r 8 on q and v; effective batch 16, one epoch. The
loop takes one sample a pass, as `batch_size: 1, gradient_accumulation_steps: 16` says. Real tokens a second over the
epoch, loading left out, and the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from provenance import percentiles, provenance
from workload import samples

from luthier import assets, config
from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.plan import machine, planner
from luthier.types import Base, DataStats, Example

BATCH = 16
ROWS = (64, 104)  # samples, and the median of their lengths
SEED = {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}


def epoch(
    run: Callable[[list[Example]], None],
    cut: Callable[[list[Example]], list[list[Example]]],
    update: Callable[[], None],
) -> list[float]:
    """Seconds of each optimizer step of one epoch."""
    rows = samples(*ROWS)
    marks = [time.perf_counter()]
    for first in range(0, len(rows), BATCH):
        for one in cut(rows[first : first + BATCH]):
            run(one)
        update()
        marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks)]


def loss_of(logprobs: torch.Tensor, rows: list[Example], total: float) -> torch.Tensor:
    """The mean over the supervised tokens of the effective batch, this pass's part of it."""
    batch = collate(rows)
    return -(logprobs * batch.target_weight[batch.supervised]).sum() / total


def luthier(base: Base, dtype: str) -> list[float]:
    """The decoder, in the passes that the planner chooses."""
    from luthier.events import silent
    from luthier.pipeline.opening import open_for_tuning

    settings = config.load(
        {"base_model": base.name, "adapter": SEED, "trainer": {"batch_size": 1, "gradient_accumulation_steps": 16,
                                                                "precision": dtype}}
    )  # fmt: skip
    rows = samples(*ROWS)
    supervised = int(sum(sum(row.weights) for row in rows))
    stats = DataStats(tuple(row.length for row in rows), supervised, "benchmark")
    plan = planner.make_plan(settings, base.spec, stats, machine.probe("cpu"))
    model = open_for_tuning(settings, base, dtype, plan, silent, steps=4)  # type: ignore[arg-type]
    model.module.train()
    optimizer = torch.optim.Adam([p for p in model.module.parameters() if p.requires_grad], lr=1e-4)
    print(f"tokens_per_pass {plan.tokens_per_pass}, loss_chunk {plan.loss_chunk}", file=sys.stderr)

    def cut(step: list[Example]) -> list[list[Example]]:
        return [[step[i] for i in indices] for indices in schedule([row.length for row in step], plan)[0]]

    def run(one: list[Example]) -> None:
        loss_of(model.logprobs(collate(one)), one, 16.0).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return epoch(run, cut, update)


def plain(base: Base, dtype: str) -> list[float]:
    """Transformers and PEFT, one sample a pass."""
    import peft
    from transformers import AutoModelForCausalLM

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=kind)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)

    def run(one: list[Example]) -> None:
        (row,) = one
        ids = torch.tensor([row.ids])
        labels = torch.tensor([[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = tuned(input_ids=ids, labels=labels, use_cache=False).loss
        (loss / BATCH).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return epoch(run, lambda step: [[row] for row in step], update)


def main() -> None:
    """One contestant, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--who", choices=["luthier", "plain"])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    given = parser.parse_args()
    if given.who:
        base = assets.resolve("smollm2")
        steps = {"luthier": luthier, "plain": plain}[given.who](base, given.dtype)
        tokens = sum(row.length for row in samples(*ROWS))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps(
                {
                    "who": given.who,
                    "dtype": given.dtype,
                    "tokens": tokens,
                    "tokens_per_s": round(tokens / sum(steps)),
                    **percentiles([1000 * one for one in steps]),
                    "peak_gib": round(peak, 2),
                    **provenance("torch", "transformers", "peft"),
                }
            )
        )
        return
    for dtype in ("bf16", "fp32"):
        for who in ("luthier", "plain"):
            command = [sys.executable, __file__, "--who", who, "--dtype", dtype]
            found = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2)
            ]
            print("RESULT", json.dumps(max(found, key=lambda one: one["tokens_per_s"])), flush=True)


if __name__ == "__main__":
    main()
