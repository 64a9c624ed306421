"""What is known of each GPU: memory, arithmetic, traffic. The only place where figures of a card stand.

`nominal` figures come from the makers' data sheets (dense, 16-bit products with fp32 accumulation where that differs).
A card is `timed` when Luthier's own engine trained on it; then what its figures predict was compared with those runs,
and `source` names them. For every other card a time is given as a range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from luthier.errors import ConfigError
from luthier.registry import nearest
from luthier.types import Gpu, Machine

MIB = 2**20
GIB = 2**30
TAKEN = 450 * MIB  # what a driver and an idle desktop hold of a card that is only imagined
DATASHEET = "data sheet"
IMAGINED = "imagined"  # the system of a machine that is not there


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. Rates a second: ``half16`` and ``single`` in 1e12 operations, ``bandwidth`` and ``link`` in 1e9 bytes.

    gemm: share of ``half16`` that large matrix products reach. half: tokens of a pass at which half of that is reached.
    host: memory of a machine that usually holds one, bytes. launch: seconds to start one kernel.
    timed: hidden size of the model whose training was timed on it; 0: none was.
    """

    name: str
    memory: int  # bytes in all, as the driver tells
    capability: tuple[int, int]
    half16: float
    single: float
    bandwidth: float
    link: float = 12.0
    gemm: float = 0.6
    half: float = 150.0
    launch: float = 6e-6
    host: int = 32 * GIB
    timed: int = 0
    source: str = DATASHEET
    aliases: tuple[str, ...] = ()


CARDS: tuple[Card, ...] = (
    Card("T4", 15360 * MIB, (7, 5), 65, 8.1, 320, gemm=0.38, host=12 * GIB, aliases=("Tesla T4",)),
    Card("P100", 16280 * MIB, (6, 0), 18.7, 9.3, 732, gemm=0.55, host=29 * GIB, aliases=("Tesla P100-PCIE-16GB",)),
    Card("V100", 16384 * MIB, (7, 0), 112, 14, 900, gemm=0.5, aliases=("V100-16", "Tesla V100-SXM2-16GB")),
    Card("V100-32", 32768 * MIB, (7, 0), 112, 14, 900, gemm=0.5, aliases=("Tesla V100-SXM2-32GB",)),
    Card("RTX 2080 Ti", 11264 * MIB, (7, 5), 54, 13.4, 616, aliases=("2080Ti",)),
    Card("RTX 3060", 12288 * MIB, (8, 6), 25.5, 12.7, 360, aliases=("3060",)),
    Card("RTX 3090", 24576 * MIB, (8, 6), 71, 35.6, 936, gemm=0.75, aliases=("3090",)),
    Card("RTX 4080", 16376 * MIB, (8, 9), 97, 48.7, 717, link=25, gemm=0.75, aliases=("4080",)),
    Card("RTX 4090", 24564 * MIB, (8, 9), 165, 82.6, 1008, link=25, gemm=0.8, aliases=("4090",)),
    Card("RTX 5090", 32607 * MIB, (12, 0), 209, 104.8, 1792, link=50, gemm=0.75, aliases=("5090",)),
    Card("A10", 23028 * MIB, (8, 6), 125, 31.2, 600, gemm=0.5),
    Card("A10G", 23028 * MIB, (8, 6), 70, 31.5, 600),
    Card("L4", 23034 * MIB, (8, 9), 121, 30.3, 300, gemm=0.45, aliases=("NVIDIA L4",)),
    Card("A6000", 49140 * MIB, (8, 6), 155, 38.7, 768, aliases=("RTX A6000",)),
    Card("L40S", 46068 * MIB, (8, 9), 362, 91.6, 864, link=25, gemm=0.5),
    Card("A100-40", 40960 * MIB, (8, 0), 312, 19.5, 1555, link=25, gemm=0.7, aliases=("A100-SXM4-40GB",)),
    Card("A100", 81920 * MIB, (8, 0), 312, 19.5, 2039, link=25, gemm=0.7, aliases=("A100-80", "A100-SXM4-80GB")),
    Card("H100", 81559 * MIB, (9, 0), 989, 67, 3350, link=50, gemm=0.65, host=64 * GIB, timed=4096,
         source="7B in benchmarks/results/train_speed_h100.csv", aliases=("H100 80GB HBM3",)),
    Card("H100-PCIe", 81559 * MIB, (9, 0), 756, 51, 2000, link=50, gemm=0.6, host=64 * GIB),
    # 790e12 operations a second were measured in bf16 (benchmarks, H200).
    Card("H200", 143771 * MIB, (9, 0), 989, 67, 4300, link=50, gemm=0.68, host=64 * GIB, timed=4096,
         source="7B in benchmarks/results/train_speed_h200.csv"),
    Card("B200", 183359 * MIB, (10, 0), 2250, 75, 8000, link=50, gemm=0.5, host=64 * GIB),
)  # fmt: skip

# What is assumed of a GPU that is not in the table: the capability decides about flash attention and bf16.
UNKNOWN = Card("unknown GPU", 16384 * MIB, (8, 0), 65, 16, 500, gemm=0.5, source="assumed")


def card_named(name: str) -> Card:
    """The card that a person names, or a driver. Raises ConfigError config-bad-value with the known names."""
    model, size = _model(name)
    for wanted in (model, model.replace("pcie", "")):  # a form of its own where the table has one
        found = [card for card in CARDS if wanted in _models(card) and (size is None or _near(card, size * GIB))]
        if found:  # the A100 of 80 GiB is called A100, that of 40 GiB is not
            return min(found, key=lambda card: _plain(card.name) not in (_plain(name), wanted))
    known = [card.name for card in CARDS]
    close = nearest(name, known)
    if close and close[0].lower() != name[0].lower():  # a GH200 is no H200 with a slip of the pen
        close = None
    raise ConfigError(
        "config-bad-value",
        f"there is no GPU named {name!r} in Luthier's table",
        where="--gpu",
        received=name or "nothing",
        allowed=known,
        fix=(f"did you mean {close!r}? Or " if close else "") + "give its memory instead: --memory 16GiB",
    )


def card_of(gpu: Gpu) -> Card:
    """The card behind a driver's name such as ``NVIDIA A100-SXM4-80GB``; `UNKNOWN` with its capability otherwise."""
    model = _model(gpu.name)[0]
    found = [(len(one), card) for card in CARDS for one in _models(card) if one in model and _near(card, gpu.memory)]
    return max(found, key=lambda pair: pair[0])[1] if found else UNKNOWN


def imagined(card: Card, memory: int | None = None) -> Machine:
    """A machine with one such card, idle; ``memory`` in bytes stands for the card's free memory."""
    free = card.memory - TAKEN if memory is None else memory
    gpu = Gpu(card.name, max(card.memory, free), free, card.capability)
    return Machine(cores=4, memory=card.host, free_memory=card.host - GIB, gpus=(gpu,), system=IMAGINED)


def _near(card: Card, memory: int) -> bool:
    return 0.8 < card.memory / memory < 1.25 if memory else False


def _models(card: Card) -> set[str]:
    return {_model(one)[0] for one in (card.name, *card.aliases)}


def _model(name: str) -> tuple[str, int | None]:
    """A name without maker, socket and memory, and that memory in GiB: `A100-SXM4-80GB` is an a100 of 80."""
    size = _SIZE.search(name)
    return _plain(_SIZE.sub("", name)), int(size[1]) if size else None


def _plain(name: str) -> str:
    return "".join(c for c in _AROUND.sub("", name.lower()) if c.isalnum())


_SIZE = re.compile(r"[\s_-](\d{2,3})(?:\s*gi?b\b|$)", re.IGNORECASE)
_AROUND = re.compile(r"nvidia|geforce|tesla|sxm\d*|hbm\d*e?")
