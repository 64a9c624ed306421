"""What an adapter_config.json may say: nothing to import, no pattern that takes minutes, no size beyond its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.assets.spec import read_json, tensors
from luthier.errors import AssetError, Fault

IMPORTED = ("megatron_config",)  # with it, PEFT imports the module that megatron_core names
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters")
KEYED = ("rank_pattern", "alpha_pattern")  # their keys are patterns
SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size", "token_dim", "num_layers",
         "num_attention_heads", "oft_block_size", "rank_pattern")  # fmt: skip
REPEATS = 3  # of any length, in one pattern; nested ones take exponential time


def check_adapter(folder: Path) -> None:
    """Refuse an adapter's config that could run code, or take minutes or memory out of proportion to its weights.

    Raises:
        AssetError: ``asset-damaged`` or ``asset-unsupported``, with all faults.
    """
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    said = read_json(path)
    faults = [
        Fault("asset-unsupported", f"the adapter wants the module {said.get('megatron_core')!r} imported",
              f"{path} {name}", said[name], "an adapter that asks for no imports", f"remove {name} from the file")
        for name in IMPORTED
        if said.get(name)
    ]  # fmt: skip
    faults += [
        Fault("asset-unsupported", f"a pattern of the adapter's config {why}", f"{path} {name}", pattern[:80],
              f"at most {REPEATS} repeats of any length, none inside another",
              "list the names of the modules instead")
        for name, pattern in _patterns(said)
        if (why := _costly(pattern))
    ]  # fmt: skip
    most = _largest_side(weights) if weights.is_file() else None
    for name in SIZES:
        value = said.get(name)
        for size in value.values() if isinstance(value, Mapping) else () if value is None else (value,):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (most is not None and size > most):
                allowed = "a whole number" + ("" if most is None else f" up to {most:,}, as large as its weights are")
                faults.append(
                    Fault(
                        "asset-damaged",
                        f"{name} does not fit the adapter's weights",
                        str(path),
                        size,
                        allowed,
                        "get the adapter again",
                    )
                )
    if faults:
        raise AssetError(faults)


def _patterns(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in PATTERNS:
        value = said.get(name)
        for one in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
            yield name, str(one)
    for name in KEYED:
        if isinstance(said.get(name), Mapping):
            yield from ((name, str(one)) for one in said[name])


def _costly(pattern: str) -> str | None:
    """Why a pattern may take minutes on a module's name; None when it cannot."""
    try:
        found, nested = _repeats(re._parser.parse(pattern))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        return f"cannot be read: {error}"
    if nested:
        return "repeats what is repeated itself"
    return "has too many repeats" if found > REPEATS else None


def _repeats(node: Any, inside: bool = False) -> tuple[int, bool]:
    """How many repeats of more than one stand in a parsed pattern, and whether one stands in another."""
    count, nested = 0, False
    for item in node if isinstance(node, (list, tuple)) or hasattr(node, "data") else ():
        repeated = isinstance(item, tuple) and str(item[0]).endswith(("REPEAT", "REPEAT_CHAR")) and int(item[1][1]) > 1
        nested |= repeated and inside
        deeper, worse = _repeats(item[1] if repeated else item, inside or repeated)
        count, nested = count + repeated + deeper, nested or worse
    return count, nested


def _largest_side(path: Path) -> int:
    """The longest side of any tensor of a safetensors file."""
    list(tensors(path))  # raises what is wrong with it
    with path.open("rb") as stream:
        header: dict[str, Any] = json_reader.parse(stream.read(int.from_bytes(stream.read(8), "little")))
    return max((side for name, one in header.items() if name != "__metadata__" for side in one["shape"]), default=0)
