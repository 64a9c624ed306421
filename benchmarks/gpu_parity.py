"""Are gradients on a GPU as near to fp64 as those of the plain loop? Every way of executing a step, and mutants.

    python benchmarks/gpu_parity.py --out benchmarks/results/gpu_parity.json

For each seed a small random Llama with an adapter takes one step. The reference is Luthier's decoder in fp64
on the CPU, one sample a pass, which the unit tests hold against transformers. The yardstick is the plain loop in bf16:
transformers and PEFT under autocast, one sample a pass. What is told of each way is the mean, over the seeds, of its
relative error over the plain loop's. At most 1.1 passes; a mutant must fail. With dropout, whose masks PEFT would draw
otherwise, the yardstick is the decoder itself, one sample a pass without fused kernels. The result carries a hash of
the sources of kernels and of what starts them, so that a test can tell when it is of others than those that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.config.adapter import Lora
from luthier.data.collate import collate
from luthier.kernels import attention, backend
from luthier.model.decoder.decoder import Decoder, Execution
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.save import named_weights
from luthier.model.decoder.shape import read_shape
from luthier.plan.passes import ROUND
from luthier.types import Example

BOUND = 1.1
SECTION, DROPOUT = Lora(r=8, alpha=16), Lora(r=8, alpha=16, dropout=0.2)
# What training computes with; the kernels of generation have tests of their own.
KERNELS = ("attention", "backend", "glu", "keyed", "linear", "logprob", "nf4", "norm", "rotary")
STARTED_BY = ("graphs", "layer", "nodes")  # of the decoder


def kernels_hash(root: Path) -> str:
    """Of the sources of the training kernels and of what starts them, in the order of their names."""
    digest = hashlib.sha256()
    source = root / "src" / "luthier"
    kernels = [source / "kernels" / part / f"{name}.py" for name in KERNELS for part in ("", "gpu")]
    for path in (*kernels, *(source / "model" / "decoder" / f"{name}.py" for name in STARTED_BY)):
        if path.is_file():
            digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def make(folder: Path, seed: int) -> Any:
    """A random Llama in bf16, saved; grouped queries, an odd vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1003, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def rows(seed: int) -> list[Example]:
    """Samples of very different lengths; half of each is supervised, some tokens weigh more."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 1003, (30,), generator=draw).tolist()  # what the longer ones start with
    out = []
    for row, length in enumerate((1, 65, 64, 200, 17, 130, 3, 90)):
        ids = torch.randint(3, 1003, (length,), generator=draw).tolist()
        ids[: len(common)] = common if length > 2 * len(common) else ids[: len(common)]
        weights = [0.0 if i < length // 2 else 1.0 + 0.5 * (i % 3 == 0) for i in range(length)]
        out.append(Example(ids, weights, row))
    return out


def gradient(
    run: Callable[[Any], torch.Tensor], parameters: list[torch.Tensor], passes: list[list[Example]], share: bool = False
) -> Any:
    """All gradients of the step as one vector, in fp64 on the CPU."""
    total = sum(sum(row.weights[1:]) for one in passes for row in one)
    for one in passes:
        batch = collate(one, 1, share=share)
        if not len(batch.supervised):  # type: ignore[arg-type]
            continue
        logprobs = run(batch)
        weight = batch.target_weight[batch.supervised].to(logprobs)
        (-(logprobs * weight).sum() / total).backward()
    found = torch.cat([p.grad.detach().double().cpu().flatten() for p in parameters])  # type: ignore[union-attr]
    for parameter in parameters:
        parameter.grad = None
    return found


def adapted(decoder: Decoder, seed: int, section: Lora = SECTION) -> Decoder:
    """The decoder with an adapter that is not at its start; the same numbers wherever it lies."""
    decoder.adapt(section, seed)
    draw = torch.Generator().manual_seed(seed)
    for pair in decoder.pairs:
        pair.lora_B.data.copy_(0.05 * torch.randn(pair.lora_B.shape, generator=draw))
    return decoder.train()


def plain_loop(folder: Path, like: Decoder, quantised: bool, passes: list[list[Example]], device: str) -> Any:
    """Transformers and PEFT in bf16 under autocast, with the decoder's adapter."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from luthier.model.generic import GenericModel

    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=four if quantised else None
    )
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    state = dict(tuned.named_parameters())
    parameters = []
    for pair in like.pairs:
        for factor in ("lora_A", "lora_B"):
            own = state[f"base_model.model.{pair.name}.{factor}.default.weight"]
            own.data = getattr(pair, factor).detach().to(device, torch.float32)
            parameters.append(own)
    generic = GenericModel(tuned)

    def run(batch: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return generic.logprobs(batch)

    return gradient(run, parameters, passes)


def masters(decoder: Decoder) -> list[torch.Tensor]:
    """In the order in which the plain loop's are compared."""
    return [factor for pair in decoder.pairs for factor in (pair.lora_A, pair.lora_B)]


def ways(packed: list[list[Example]], graphs: bool) -> dict[str, tuple[Execution, list[list[Example]]]]:
    """Name -> how a step is executed."""
    flash = Execution("flash", loss_chunk=64, multiple=ROUND)
    found = {
        "packed": (flash, packed),
        "two passes": (flash, [packed[0][:3], packed[0][3:]]),
        "prefix shared": (flash, packed),
        "padded attention": (replace(flash, attention="padded"), packed),
        "recomputed": (replace(flash, recompute_layers=4), packed),
        "offloaded": (replace(flash, recompute_layers=3, offload=True), packed),
        "tiles": (replace(flash, mlp_tile=64, recompute_layers=2), packed),
    }
    return found | ({"graphs": (replace(flash, graphs=True), packed)} if graphs else {})


def host_ways(packed: list[list[Example]]) -> dict[str, tuple[Execution, list[list[Example]]]]:
    """Name -> how a step is executed on a CPU."""
    plain = Execution(loss_chunk=64, multiple=32)
    return {
        "packed": (plain, packed),
        "two passes": (plain, [packed[0][:3], packed[0][3:]]),
        "prefix shared": (plain, packed),
        "recomputed": (replace(plain, recompute_layers=4), packed),
        "tiles": (replace(plain, mlp_tile=64, recompute_layers=2), packed),
    }


def one_seed(seed: int, ratios: dict[str, list[float]], device: str = "cuda") -> None:
    """Add this seed's ratios; on a CPU those of its own ways alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, seed)
        shape = read_shape(folder)
        every, single = [rows(seed)], [[row] for row in rows(seed)]
        for quantised in (False, True):
            kind = "nf4" if quantised else "bf16"
            on = {"dtype": torch.bfloat16, "device": device, "quantised": "nf4" if quantised else None}
            exact = adapted(_exact(folder, shape, on, quantised), seed)
            want = gradient(exact.logprobs, masters(exact), single)
            yardstick = _error(plain_loop(folder, exact, quantised, single, device), want)
            placed = ["resident", *(["quantised"] if quantised else []), "streamed"]
            for weights in placed if device == "cuda" else placed[:1]:
                decoder = adapted(load_decoder(folder, shape, Placing(**on, weights=weights)), seed)  # type: ignore[arg-type]
                found = ways(every, weights != "streamed") if device == "cuda" else host_ways(every)
                for way, (execution, passes) in found.items():
                    decoder.execution = execution
                    if execution.graphs:
                        gradient(decoder.logprobs, masters(decoder), passes)  # the first pass is never a graph
                    share = way == "prefix shared"
                    got = gradient(decoder.logprobs, masters(decoder), passes, share)
                    ratios.setdefault(f"{kind} {weights}, {way}", []).append(_error(got, want) / yardstick)
                decoder.execution = Execution("flash" if device == "cuda" else "padded")
                if weights == "resident":
                    _mutants(decoder, every, want, yardstick, kind, ratios)
        if device == "cuda":
            _with_dropout(folder, shape, seed, ratios)


def _with_dropout(folder: Path, shape: Any, seed: int, ratios: dict[str, list[float]]) -> None:
    """The same masks however a step is laid out; with those of another seed the gradient is another one."""
    every, single = [rows(seed)], [[row] for row in rows(seed)]
    exact = adapted(load_decoder(folder, shape, Placing(torch.float64)), seed, DROPOUT)
    want = gradient(exact.logprobs, masters(exact), single)
    decoder = adapted(load_decoder(folder, shape, Placing(torch.bfloat16, device="cuda")), seed, DROPOUT)
    with backend.use("plain"):
        yardstick = _error(gradient(decoder.logprobs, masters(decoder), single), want)
    for way, (execution, passes) in ways(every, True).items():
        if way == "prefix shared":
            continue  # a shared token would have several masks
        decoder.execution = execution
        if execution.graphs:
            gradient(decoder.logprobs, masters(decoder), passes)
        got = gradient(decoder.logprobs, masters(decoder), passes)
        ratios.setdefault(f"bf16 resident, dropout, {way}", []).append(_error(got, want) / yardstick)
    decoder.execution = Execution("flash")
    decoder._seed = seed + 1  # what the masks are drawn from
    got = gradient(decoder.logprobs, masters(decoder), every)
    ratios.setdefault("mutant: bf16, masks of another seed", []).append(_error(got, want) / yardstick)


def _exact(folder: Path, shape: Any, on: dict[str, Any], quantised: bool) -> Decoder:
    """The base in fp64 on the CPU, with the values that 4 bits leave of it where it is quantised."""
    if not quantised:
        return load_decoder(folder, shape, Placing(torch.float64))
    from safetensors.torch import save_file

    state = {
        name: value.detach().cpu().contiguous()
        for name, value in named_weights(load_decoder(folder, shape, Placing(**on)))
    }
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        return load_decoder(copy, shape, Placing(torch.float64))


def _mutants(
    decoder: Decoder, passes: Any, want: Any, yardstick: float, kind: str, ratios: dict[str, list[float]]
) -> None:
    whole = attention.spans
    attention.spans = lambda lengths, device, parents=None: whole([sum(lengths)], device)  # type: ignore[assignment]
    try:
        got = gradient(decoder.logprobs, masters(decoder), passes)
    finally:
        attention.spans = whole
    ratios.setdefault(f"mutant: {kind}, no mask between samples", []).append(_error(got, want) / yardstick)
    got = 1.05 * gradient(decoder.logprobs, masters(decoder), passes)
    ratios.setdefault(f"mutant: {kind}, scaled by 1.05", []).append(_error(got, want) / yardstick)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def main() -> int:
    """0 when every way passes and every mutant fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        one_seed(seed, ratios)
    means = {name: round(statistics.mean(values), 3) for name, values in ratios.items()}
    wrong = [name for name, mean in means.items() if (mean > BOUND) != name.startswith("mutant")]
    import triton

    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seeds": given.seeds,
        "bound": BOUND,
        "kernels": kernels_hash(Path(__file__).resolve().parents[1]),
        "mean_error_over_plain_loop": means,
        "wrong": wrong,
    }
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
