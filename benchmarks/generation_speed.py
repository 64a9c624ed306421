"""How fast answers are made: the engine on the decoder, and transformers' generate, on the same random weights.

    python benchmarks/generation_speed.py FOLDER [--shape 7b] [--device cuda] [--dtype bfloat16] [--scale 1.0]

Every contestant makes the same number of tokens for the same prompts (ends are blocked until then). Prints one RESULT
line, in JSON, a setting; a setting that fails prints its error and the others go on. `--scale` multiplies the numbers
of tokens, for a trial. `nf4`: the matrices stay in 4 bits, as where memory does not hold them spread out.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from workload import VOCAB, make_model

import luthier.infer.forward as forward_module
from luthier.config.adapter import Lora
from luthier.infer.cache import Cache
from luthier.infer.engine import DecoderEngine
from luthier.infer.forward import Forward
from luthier.infer.stepping import Stepper
from luthier.model.decoder.adapter import Adapter, read_adapter
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.save import save_adapter
from luthier.model.decoder.shape import read_shape
from luthier.model.decoder.weights import Quantised
from luthier.types import Request, Sampling

SETTINGS = {"6 x 512": (6, 512), "1 x 256": (1, 256), "32 x 256": (32, 256), "256 x 256": (256, 256)}
FOUR_BITS = {"1 x 256": (1, 256), "4 x 256": (4, 256), "32 x 256": (32, 256)}


class Ids:
    """A tokenizer that leaves ids alone; its only end is never likely."""

    eos_ids = (2,)
    pad_id = 2

    def decode(self, ids: Any) -> str:
        """Something for every id."""
        return "x" * len(ids)


def prompts(count: int, length: int = 100) -> list[list[int]]:
    """Prompts of ``length`` ids each, give or take a fifth, the same every time."""
    draw = random.Random(count)
    lengths = [length if count == 1 else draw.randint(length * 4 // 5, length * 6 // 5) for _ in range(count)]
    return [[draw.randrange(3, VOCAB) for _ in range(own)] for own in lengths]


def tell(name: str, **values: Any) -> None:
    """One line of the result."""
    short = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in values.items()}
    print("RESULT", json.dumps({"name": name} | short), flush=True)


def attempt(name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Tell what ``run`` measures, or why it could not."""
    try:
        tell(name, **run())
    except Exception as error:
        traceback.print_exc()
        tell(name, error=repr(error)[:300])


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ours(
    decoder: Decoder, count: int, steps: int, device: str, adapters: Mapping[str, Adapter] | None = None
) -> dict[str, Any]:
    """The whole call of `generate`: weights made ready, prompts read, tokens made. Rows take turns of ``adapters``."""
    sampling = Sampling(max_new_tokens=steps, min_new_tokens=steps)
    names = [*(adapters or {}), None]
    requests = [
        Request(key, prompt, sampling, adapter=names[key % len(names)]) for key, prompt in enumerate(prompts(count))
    ]
    engine = DecoderEngine(decoder, Ids(), adapters=adapters)
    wait(device)
    start = time.perf_counter()
    done = list(engine.generate(requests))
    seconds = time.perf_counter() - start
    assert all(len(completion.ids) == steps for completion in done), [c.error for c in done if c.error][:1]
    return {"seconds": seconds, "tokens_per_second": count * steps / seconds, "tokens": count * steps}


def first_token(decoder: Decoder, device: str) -> dict[str, Any]:
    """Milliseconds from asking to the first text, for a prompt of 100 tokens."""
    times = []
    for _ in range(5):
        stream = DecoderEngine(decoder, Ids()).stream(Request(0, prompts(1)[0], Sampling(max_new_tokens=64)))
        wait(device)
        start = time.perf_counter()
        next(stream)
        times.append(1000 * (time.perf_counter() - start))
        stream.close()  # type: ignore[attr-defined]
    return {"first_ms": times[0], "milliseconds": sorted(times)[2]}


def replay_equals_eager(decoder: Decoder, rows: int = 8) -> dict[str, Any]:
    """The scores of some replayed steps against those of the same steps run one operation at a time."""
    asked = prompts(rows, 40)
    found = {}
    with torch.inference_mode():
        forward = Forward(decoder)
        for way in ("eager", "replayed"):
            cache = Cache(decoder.shape, rows, 128, decoder.device, decoder.dtype)
            stepper = Stepper(forward, cache, Ids.eos_ids, print)
            first = forward.prefill(asked, range(rows), cache).argmax(-1).tolist()
            stepper.put(first, [len(prompt) for prompt in asked], [100] * rows)
            steps = []
            for _ in range(6):
                if way == "eager":
                    step = stepper._once(rows, cache.capacity, True)
                else:
                    step = stepper.advance(rows, cache.capacity, True)
                steps.append(step.raw.clone())
            found[way] = torch.stack(steps)
    apart = (found["eager"] - found["replayed"]).abs().max()
    tokens = (found["eager"].argmax(-1) == found["replayed"].argmax(-1)).float().mean()
    return {"largest_difference": float(apart), "same_tokens": float(tokens), "graphs": len(stepper._captured)}


def agreement(decoder: Decoder, model: Any, rows: int, steps: int) -> dict[str, Any]:
    """The share of our greedy tokens that transformers finds likeliest too, given the same text."""
    asked = prompts(rows)
    sampling = Sampling(max_new_tokens=steps, min_new_tokens=steps)
    requests = [Request(key, prompt, sampling) for key, prompt in enumerate(asked)]
    hits = total = 0
    for done in DecoderEngine(decoder, Ids()).generate(requests):
        whole = torch.tensor([[*asked[done.key], *done.ids]], device=model.device)
        with torch.inference_mode():
            logits = model(whole).logits[0, len(asked[done.key]) - 1 : -1].clone()
            logits[:, list(Ids.eos_ids)] = float("-inf")
        hits += int((logits.argmax(-1).cpu() == torch.tensor(done.ids)).sum())
        total += len(done.ids)
    return {"share": hits / total, "tokens": total}


def theirs(model: Any, count: int, steps: int, device: str) -> dict[str, Any]:
    """The same by transformers' generate over one padded batch."""
    from transformers import GenerationConfig

    asked = prompts(count)
    width = max(map(len, asked))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in asked], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked], device=device)
    config = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    wait(device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, generation_config=config)
    wait(device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens_per_second": count * steps / seconds, "tokens": count * steps}


def theirs_continuous(model: Any, count: int, steps: int, device: str) -> dict[str, Any]:
    """The same by transformers' continuous batching, after a short call: its graphs are made and its cache is there."""
    from transformers import GenerationConfig

    asked = prompts(count)
    seconds = 0.0
    for count_each in (min(16, steps), steps):
        config = GenerationConfig(max_new_tokens=count_each, do_sample=False, eos_token_id=-1, pad_token_id=2)
        wait(device)
        start = time.perf_counter()
        made = model.generate_batch(asked, generation_config=config, persistent_manager=True)
        wait(device)
        seconds = time.perf_counter() - start
        assert [len(one.generated_tokens) for one in made.values()] == [count_each] * count
    model.destroy_cached_continuous_batching_manager()  # which was sized for these requests
    return {"seconds": seconds, "tokens_per_second": count * steps / seconds, "tokens": count * steps}


def compare(
    decoder: Decoder, folder: Path, device: str, dtype: torch.dtype, steps: int, settings: list[tuple[str, int, int]]
) -> None:
    """Transformers on the same weights: how far it agrees, and how fast it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    attempt("agreement", lambda: agreement(decoder, model, 4, steps))
    for way, run in (("", theirs), (", continuous batching,", theirs_continuous)):
        for name, rows, count in settings:
            attempt(
                f"transformers{way} {name}",
                lambda run=run, rows=rows, count=count: run(model, rows, count, device),  # type: ignore[misc]
            )


SECTION = Lora(r=8, alpha=16)


def adapt(decoder: Decoder) -> None:
    """A low-rank adapter on every matrix, with an effect."""
    decoder.adapt(SECTION, seed=1)
    for pair in decoder.pairs:
        torch.nn.init.normal_(pair.lora_B, std=0.01)


def several(decoder: Decoder, count: int) -> dict[str, Adapter]:
    """So many adapters of an adapted decoder's shape, each with its own effect, by way of their files."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            for pair in decoder.pairs:
                torch.nn.init.normal_(pair.lora_B, std=0.01)
            save_adapter(decoder, SECTION, Path(folder) / str(number), "base")
            made[str(number)] = read_adapter(decoder, SECTION, Path(folder) / str(number), str(number))
    return made


def four_bits(folder: Path, device: str, dtype: torch.dtype, settings: list[tuple[str, int, int]]) -> None:
    """A base in NF4 that is not spread out: by the product of a few rows, and de-quantised for every step."""
    placing = Placing(dtype=dtype, device=device, quantised="nf4", weights="quantised")
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    decoder = load_decoder(folder, read_shape(folder), placing)
    held = (torch.cuda.memory_allocated() - before) / 2**30 if device == "cuda" else 0.0
    for way, multiplies in (("", Quantised.multiplies), (", de-quantised each step,", lambda self, x: False)):
        kept = mock.patch.object(forward_module, "fits_spread", lambda *sizes: False)
        with kept, mock.patch.object(Quantised, "multiplies", multiplies):
            for name, rows, steps in settings:
                ours(decoder, rows, 8, device)  # compiles the kernels
                attempt(
                    f"luthier nf4{way} {name}",
                    lambda rows=rows, steps=steps: ours(decoder, rows, steps, device) | {"held_gib": held},  # type: ignore[misc]
                )


def spread_out(
    folder: Path, device: str, dtype: torch.dtype, settings: list[tuple[str, int, int]], compared: int
) -> None:
    """The base in the compute type, beside transformers; with an adapter; with several. ``compared``: tokens."""
    start = time.perf_counter()
    decoder = load_decoder(folder, read_shape(folder), Placing(dtype=dtype, device=device))
    tell("loaded", seconds=time.perf_counter() - start)

    attempt("replay equals eager", lambda: replay_equals_eager(decoder))
    attempt("warm", lambda: ours(decoder, 2, 16, device))
    for name, rows, steps in settings:
        attempt(f"luthier {name}", lambda rows=rows, steps=steps: ours(decoder, rows, steps, device))  # type: ignore[misc]
    attempt("luthier first token", lambda: first_token(decoder, device))
    compare(decoder, folder, device, dtype, compared, settings)
    adapt(decoder)
    for name, rows, steps in settings:
        attempt(f"luthier with adapter {name}", lambda rows=rows, steps=steps: ours(decoder, rows, steps, device))  # type: ignore[misc]
    adapters = several(decoder, 3)
    with decoder.without_adapter():
        for name, rows, steps in settings:
            attempt(
                f"luthier with three adapters and none {name}",
                lambda rows=rows, steps=steps: ours(decoder, rows, steps, device, adapters),  # type: ignore[misc]
            )


def main() -> None:
    """Run every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=256, help="leave out settings of more rows")
    parser.add_argument("--nf4", action="store_true", help="only the settings in 4 bits")
    options = parser.parse_args()
    begin = time.perf_counter()
    device, dtype = options.device, getattr(torch, options.dtype)
    folder = make_model(options.folder, options.shape, device)
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    tell("made", seconds=time.perf_counter() - begin, device=card)

    def scaled(settings: dict[str, tuple[int, int]]) -> list[tuple[str, int, int]]:
        fits = ((name, rows, max(4, int(steps * options.scale))) for name, (rows, steps) in settings.items())
        return [setting for setting in fits if setting[1] <= options.rows]

    if not options.nf4:
        spread_out(folder, device, dtype, scaled(SETTINGS), max(8, int(64 * options.scale)))
    four_bits(folder, device, dtype, scaled(FOUR_BITS))
    tell("all", seconds=time.perf_counter() - begin, torch=torch.__version__)


if __name__ == "__main__":
    main()
