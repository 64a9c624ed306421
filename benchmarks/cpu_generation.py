"""Generation on a CPU with the built-in model: Luthier's engine and transformers' batched generate, in turns.

    python benchmarks/cpu_generation.py --out results.jsonl        (about five minutes on two cores)

6 prompts x 512 tokens (the seed's prediction) and 32 x 64, bf16 and fp32, min_new_tokens = max_new_tokens, so that
both make the same count. Each setting runs both `--repeats` times in turns, after a short call of each; the least wall
time and the least processor time of each count. Loading is left out; making Luthier's weights ready is not.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier import assets
from luthier.infer.engine import DecoderEngine
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.plan.machine import probe
from luthier.types import Request, Sampling

SETTINGS = {"6 x 512": (6, 512), "32 x 64": (32, 64)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
END = 2


Run = Callable[[int, int], None]  # rows, tokens of each


class Ids:
    """A tokenizer that has no text."""

    eos_ids, pad_id = (END,), 0

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


def prompts(count: int) -> list[list[int]]:
    """Random tokens, 20 to 60 of them."""
    draw = random.Random(count)
    return [[draw.randrange(10, 32000) for _ in range(draw.randint(20, 60))] for _ in range(count)]


def luthier(folder: Path, dtype: torch.dtype) -> Run:
    """The engine."""
    decoder = load_decoder(folder, read_shape(folder), Placing(dtype=dtype))

    def run(rows: int, steps: int) -> None:
        sampling = Sampling(max_new_tokens=steps, min_new_tokens=steps)
        requests = [Request(key, prompt, sampling) for key, prompt in enumerate(prompts(rows))]
        done = list(DecoderEngine(decoder, Ids()).generate(requests))
        assert all(len(one.ids) == steps for one in done)

    return run


def transformers(folder: Path, dtype: torch.dtype) -> Run:
    """One padded batch."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def run(rows: int, steps: int) -> None:
        asked = prompts(rows)
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in asked])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
        config = GenerationConfig(
            max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=END, pad_token_id=0
        )
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, generation_config=config)
        assert made.shape[1] == width + steps

    return run


def timed(run: Run, rows: int, steps: int) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, own = time.perf_counter(), time.process_time()
    run(rows, steps)
    return time.perf_counter() - wall, time.process_time() - own


def compared(contestants: dict[str, Run], rows: int, steps: int, repeats: int) -> dict[str, float]:
    """The least seconds of each, and how many times more transformers takes."""
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in contestants}
    for _ in range(repeats):
        for who, run in contestants.items():
            times[who].append(timed(run, rows, steps))
    out: dict[str, float] = {}
    for who, measured in times.items():
        wall, own = (min(column) for column in zip(*measured, strict=True))
        out |= {f"{who}_s": round(wall, 3), f"{who}_processor_s": round(own, 3)}
    for kind in ("s", "processor_s"):
        out[f"ratio_{kind}"] = round(out[f"transformers_{kind}"] / out[f"luthier_{kind}"], 3)
    return out


def main() -> None:
    """Every setting of every type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of an answer, for a quick look")
    options = parser.parse_args()
    folder = assets.resolve("smollm2").path
    here = {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": probe("cpu").cpu,
            "python": platform.python_version()}  # fmt: skip
    lines = []
    for dtype in options.dtypes:
        kind = DTYPES[dtype]
        contestants = {"luthier": luthier(folder, kind), "transformers": transformers(folder, kind)}
        for run in contestants.values():
            run(2, 33)
        for setting, (rows, most) in SETTINGS.items():
            steps = max(33, int(most * options.scale))
            line = {"setting": setting, "dtype": dtype, "rows": rows, "tokens": steps}
            line |= compared(contestants, rows, steps, options.repeats)
            print(json.dumps(line | here), flush=True)
            lines.append(json.dumps(line | here) + "\n")
    if options.out is not None:
        options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
