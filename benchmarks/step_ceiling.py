"""How much of a training step is the products with the frozen weights alone: what no plan can take away.

    python benchmarks/step_ceiling.py --folder /tmp/llama7b --out ceiling.json

For every step of the epoch that `train_speed.py` times, the products of a Llama with the frozen weights, forward and
back, run alone in torch's own matrix product, at the length that the step's pass is padded to; nothing else does (no
attention, norm, adapter, loss or optimizer, no head). Beside them the measured steps of "seed resident" with and
without graphs.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path

import torch
from provenance import provenance
from train_speed import BATCH, SEED, measure
from workload import SHAPES, lengths, make_model

from luthier.model.decoder.decoder import Execution
from luthier.model.decoder.load import Placing
from luthier.plan.passes import EAGER, GRAPHED, padded

REPEATS = 20


def products_ms(model: str, tokens: int, device: str = "cuda", repeats: int = REPEATS) -> float:
    """Milliseconds of all layers' products at so many tokens: X W^T forward, dY W back, of the four fused matrices."""
    shape = SHAPES[model]
    h, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    work = []
    for rows, columns in ((h + 2 * kv, h), (h, h), (2 * f, h), (h, f)):
        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        dy = torch.randn(tokens, rows, device=device, dtype=torch.bfloat16)
        work += [(x, weight.T), (dy, weight)]
    seconds = []
    for _ in range(2):  # the first warms up
        _finish(device)
        started = time.perf_counter()
        for _ in range(repeats):
            for left, right in work:
                torch.mm(left, right)
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * seconds[-1] / repeats * layers


def flops(model: str, tokens: int) -> float:
    """Of those products."""
    shape = SHAPES[model]
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return 2 * 2 * tokens * shape["num_hidden_layers"] * h * (h + 2 * kv + h + 3 * f)


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure the steps, then their products."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama7b"))
    parser.add_argument("--model", default="7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=28)
    given = parser.parse_args()
    make_model(given.folder, given.model)
    every = lengths()
    steps = [sum(every[i : i + BATCH]) for i in range(0, len(every) // BATCH * BATCH, BATCH)][: given.steps]
    products = cache(lambda tokens: products_ms(given.model, tokens))
    found = []
    for graphs in (False, True):
        multiple = (GRAPHED if graphs else EAGER)[-1]
        execution = Execution("flash", loss_chunk=2048, graphs=graphs, multiple=multiple)
        placing = Placing(dtype=torch.bfloat16, device="cuda", quantised="nf4")
        row = measure("seed resident" + " graphs" * graphs, given.folder, SEED, placing, execution, 32768, given.steps)
        shapes = [padded(tokens, multiple, graphs) for tokens in steps]
        alone = sum(map(products, shapes))
        found.append(
            {
                "setting": row["setting"],
                "tokens_per_s": row["tokens_per_s"],
                "ms_per_step": row["ms_per_step"],
                "tokens_per_step": round(sum(steps) / len(steps)),
                "padded_tokens_per_step": round(sum(shapes) / len(shapes)),
                "products_alone_ms_per_step": round(alone / len(steps), 1),
                "products_tflops": round(sum(flops(given.model, one) for one in shapes) / alone / 1e9),
                "tokens_per_s_of_products_alone": round(sum(steps) / alone * 1000),
            }
        )
        print("RESULT", json.dumps(found[-1]), flush=True)
    if given.out:
        card = torch.cuda.get_device_name()
        given.out.write_text(
            json.dumps({"card": card, **provenance("torch", "triton"), "steps": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
