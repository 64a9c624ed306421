"""A trained adapter as it is applied, apart from a decoder: several of them stand beside one base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.kernels.linear import Part, Update
from luthier.model.adapters import require_same
from luthier.model.decoder import lora
from luthier.model.decoder.decoder import Decoder, modules
from luthier.model.load import read_weights


@dataclass(frozen=True)
class Adapter:
    """The low-rank updates of each layer's products, in the decoder's compute type and on its device."""

    name: str
    layers: tuple[Mapping[str, Update], ...]


def read_adapter(decoder: Decoder, section: Any, folder: Path, name: str) -> Adapter:
    """The adapter that a config's section describes, with the weights of a folder in PEFT's format.

    Raises AssetError asset-damaged when they are not exactly the weights of such an adapter on this decoder.
    """
    path = folder / "adapter_model.safetensors"
    found = read_weights(path)
    rows = modules(decoder.shape)
    names = [f"model.layers.{n}.{part}" for n in range(decoder.shape.layers) for own in rows.values() for part in own]
    ranks = lora.ranks(section, names)
    wanted: dict[str, torch.Tensor] = {}
    layers = []
    for number in range(decoder.shape.layers):
        updates = {}
        for product, places in rows.items():
            chosen = {part: place for part, place in places.items() if f"model.layers.{number}.{part}" in ranks}
            for part, place in chosen.items():
                module, rank = f"model.layers.{number}.{part}", ranks[f"model.layers.{number}.{part}"]
                wanted[_key(module, "lora_A")] = torch.empty(rank.r, decoder.width_of(product), device="meta")
                wanted[_key(module, "lora_B")] = torch.empty(place.stop - place.start, rank.r, device="meta")
            if chosen:
                updates[product] = (number, chosen)
        layers.append(updates)
    require_same(found, wanted, path)
    made = tuple(
        {product: _update(decoder, found, ranks, *where) for product, where in updates.items()} for updates in layers
    )
    return Adapter(name, made)


def _update(
    decoder: Decoder,
    found: Mapping[str, torch.Tensor],
    ranks: Mapping[str, lora.Rank],
    number: int,
    places: Mapping[str, slice],
) -> Update:
    a, b, parts, start = [], [], [], 0
    for part, rows in places.items():
        module = f"model.layers.{number}.{part}"
        rank = ranks[module]
        parts.append(Part(rows, slice(start, start + rank.r), rank.scale))
        start += rank.r
        a.append(found[_key(module, "lora_A")].to(decoder.device, decoder.dtype))
        b.append(found[_key(module, "lora_B")].to(decoder.device, decoder.dtype))
    return Update(tuple(parts), torch.cat(a), tuple(b))


def _key(module: str, factor: str) -> str:
    return f"{lora.PREFIX}{module}.{factor}.weight"
