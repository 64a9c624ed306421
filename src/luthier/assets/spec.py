"""A base model's facts, read from config.json and the headers of its safetensors files; no weights are read."""

from __future__ import annotations

import math
import operator
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.assets.measures import NAMES, check_config, check_sizes
from luthier.errors import AssetError
from luthier.run.atomic import is_inside
from luthier.types import ModelSpec

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
NESTED = ("attn_config", "ffn_config")  # parts of a config that hold sizes
HEADER_LIMIT = 256 * 2**20  # bytes; the format's own limit is 100 MB


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, those of the index alone where there is one.

    Raises AssetError asset-damaged when the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = _named(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise AssetError(
            "asset-damaged",
            f"the base model lacks {len(missing)} of its {len(names)} weight files",
            where=str(index),
            received=f"no {', '.join(missing)}",
            allowed=f"all of the {len(names)} files that the index names",
            fix="download the model again; an earlier download was not finished",
        )
    return [folder / name for name in names]


def _named(index: Path) -> list[str]:
    """The files that an index names, all of them below its folder. Raises AssetError asset-damaged."""
    named = read_json(index).get("weight_map")
    names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    outside = [name for name in names if not is_inside(name)]
    if outside or not names:
        raise AssetError(
            "asset-damaged",
            "the index of the weights names no files of this folder",
            where=str(index),
            received=", ".join(outside[:3]) or "no names",
            allowed="names of files in the same folder",
            fix="download the model again from where you trust it",
        )
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises AssetError asset-damaged when it is not one."""
    try:
        value = json_reader.read(path)
    except ValueError as error:
        raise AssetError(
            "asset-damaged",
            f"{path.name} cannot be read: {error}",
            where=str(path),
            received=str(error),
            allowed="a JSON object",
            fix="download the model again",
        ) from error
    if not isinstance(value, dict):
        raise AssetError(
            "asset-damaged",
            f"{path.name} is not a JSON object",
            where=str(path),
            received=value,
            allowed="a JSON object",
            fix="download the model again",
        )
    return value


def read_spec(folder: Path) -> ModelSpec:
    """The facts of the model in ``folder``; the number of parameters is exact.

    Raises AssetError asset-damaged for files that are missing or cut short, and a config that does not fit them.
    """
    parameters, dtypes = 0, Counter[str]()
    for path in weight_files(folder):
        for dtype, count in tensors(path):
            parameters += count
            dtypes[dtype] += count
    path = folder / "config.json"
    config = read_json(path)
    check_config(config, path)
    dtype = dtypes.most_common(1)[0][0] if dtypes else str(config.get("dtype", "float32"))
    spec = spec_of(config, parameters, dtype)
    check_sizes(config, spec, path)
    return spec


def spec_of(config: dict[str, Any], parameters: int, dtype: str) -> ModelSpec:
    """The facts that a model's config.json tells, with the number of its weights and their type."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None
    size = {name: _number(text, *others) for name, others in NAMES.items()}
    hidden, heads = size["hidden"], size["heads"]
    parts = [part for name in NESTED if isinstance(part := text.get(name), dict)]
    names = config.get("architectures") or ["unknown"]
    return ModelSpec(
        architecture=str(names[0]),
        parameters=parameters,
        layers=size["layers"] or _listed(text),
        hidden=hidden,
        intermediate=size["intermediate"] or _nested(parts, "intermediate") or _expanded(text, hidden),
        heads=heads,
        kv_heads=size["kv_heads"] or _nested(parts, "kv_heads") or heads,
        head_dim=size["head_dim"] or (hidden // heads if heads else 0),
        vocab=size["vocab"],
        context=size["context"],
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        dtype=dtype,
    )


def _listed(text: dict[str, Any]) -> int:
    """Layers where the config names the kind of each and leaves their number out, as Nemotron-H does."""
    kinds = text.get("layers_block_type")
    return len(kinds) if isinstance(kinds, list) else 0


def _nested(parts: list[dict[str, Any]], name: str) -> int:
    """A size that the config holds in a part of its own, as DBRX does; 0 where it has none."""
    return next((found for part in parts if (found := _number(part, *NAMES[name]))), 0)


def _expanded(text: dict[str, Any], hidden: int) -> int:
    """The width inside a layer where it is told as a multiple of the width outside, four times where it is not."""
    return (_number(text, "expansion_ratio") or 4) * hidden


def modules(folder: Path) -> list[str]:
    """The dotted names of the modules that have weights in a model folder. Raises AssetError asset-damaged."""
    names = (name for path in weight_files(folder) for name in places(path))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Type and number of elements of each tensor of a safetensors file. Checks that the file is as long as it says."""
    for place in places(path).values():
        yield place.dtype, place.elements


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its safetensors file: bytes ``begin`` to ``end``, counted from the start of the file."""

    dtype: str
    elements: int
    begin: int
    end: int


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies. Raises AssetError asset-damaged, also where its length is wrong."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, size):
            raise _damaged(path, "its header is cut short or is not safetensors")
        try:
            header: dict[str, Any] = json_reader.parse(stream.read(length))
            header.pop("__metadata__", None)
            found = {str(name): _place(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise _damaged(path, "its header is not that of a safetensors file") from error
    end = max((place.end for place in found.values()), default=8 + length)
    if end != size:
        raise _damaged(path, f"it has {size:,} bytes and should have {end:,}")
    return found


def _place(entry: dict[str, Any], start: int) -> Place:
    """What the header says of a tensor; its own bytes count from ``start``. Raises what a wrong type raises."""
    begin, end = entry["data_offsets"]
    shape = [operator.index(size) for size in entry["shape"]]
    if not 0 <= operator.index(begin) <= operator.index(end) or min(shape, default=0) < 0:
        raise ValueError("a place that cannot be")
    dtype = DTYPES.get(entry["dtype"], entry["dtype"].lower())
    return Place(dtype, math.prod(shape), start + begin, start + end)


def _damaged(path: Path, why: str) -> AssetError:
    return AssetError(
        "asset-damaged",
        f"a weight file is damaged: {why}",
        where=str(path),
        received=f"{path.name}: {why}",
        allowed="a whole .safetensors file",
        fix="download the model again",
    )


def _number(config: dict[str, Any], *names: str) -> int:
    known = (config[name] for name in names if isinstance(config.get(name), (int, float)))
    return next((int(value) for value in known if math.isfinite(value)), 0)
