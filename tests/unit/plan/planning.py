"""Models, data and machines that the tests of planning share."""

from __future__ import annotations

import math
import random

from luthier import config
from luthier.config import Config
from luthier.types import DataStats, Gpu, Machine, ModelSpec

GIB = 2**30


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, head: int, vocab: int, tied: bool) -> ModelSpec:
    """A Llama's facts with the exact number of its weights."""
    attention = hidden * head * (2 * heads + 2 * kv)
    layer = attention + 3 * hidden * inner + 2 * hidden
    weights = layers * layer + hidden + vocab * hidden * (1 if tied else 2)
    return ModelSpec("LlamaForCausalLM", weights, layers, hidden, inner, heads, kv, head, vocab, 8192, tied, "bfloat16")


SMALL = llama(576, 1536, 30, 9, 3, 64, 49152, True)
SEVEN = llama(4096, 11008, 32, 32, 32, 128, 49152, False)
CPU = Machine(2, 23 * GIB, 22 * GIB, cpu_bf16=True)


def gpu(free: float, capability: tuple[int, int] = (9, 0), name: str = "H200", host: float = 64) -> Machine:
    """A machine with one GPU that has ``free`` GiB free."""
    memory = max(free, 16) * GIB
    return Machine(8, int(host * GIB), int((host - 2) * GIB), (Gpu(name, int(memory), int(free * GIB), capability),))


def rows(count: int = 450, median: int = 115, most: int = 512) -> DataStats:
    """Data whose lengths are spread as instruction data are."""
    draw = random.Random(7)
    lengths = tuple(int(min(most, max(40, draw.lognormvariate(math.log(median), 0.5)))) for _ in range(count))
    return DataStats(lengths, sum(lengths) // 2, "hash")


def declared(**sections: object) -> Config:
    """A config of the seed's kind, with ``sections`` in place of its own."""
    base: dict[str, object] = {
        "base_model": "owner/model",
        "adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "quantization": {"bits": 4},
        "trainer": {"batch_size": 1, "gradient_accumulation_steps": 16, "epochs": 5},
    }
    return config.load(base | sections)
