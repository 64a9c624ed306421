"""An adapter to go on from: where its files are, and what its own config says. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.assets.adapter_bounds import check_adapter
from luthier.assets.network import trust_own_bundle
from luthier.errors import AssetError

CONFIG = "adapter_config.json"
KEY = "adapter.pretrained_adapter_weights"
# Ours -> PEFT's names, of what the saved weights are bound to. What is only of training (dropout) is not among them.
BOUND: Mapping[str, tuple[str, ...]] = {
    "r": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "bias_type": ("bias",),
    "use_dora": ("use_dora",),
    "use_rslora": ("use_rslora",),
    "init_lora_weights": ("init_lora_weights",),
    "target_modules": ("target_modules",),
    "modules_to_save": ("modules_to_save",),
    "layers_to_transform": ("layers_to_transform",),
}


def adapter_folder(source: str) -> Path:
    """The folder of an adapter: given, a run's, or fetched where it is a hub id. Raises AssetError asset-not-found."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        of_run = folder / "adapter"
        return of_run if not (folder / CONFIG).is_file() and (of_run / CONFIG).is_file() else folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    trust_own_bundle()
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AssetError(
            "asset-not-found",
            f"the adapter {source!r} is neither a folder nor on the hub",
            where=KEY,
            received=source,
            allowed="a folder with adapter_config.json, a run, or owner/name on the hub",
            fix="name a run or its adapter/ folder, or owner/name of one on the hub",
        ) from error


def no_adapter(folder: Path, lacking: str) -> AssetError:
    """The error for a folder that is no adapter's: the file ``lacking`` is not there."""
    there = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
    return AssetError(
        "asset-not-found",
        f"the adapter's folder has no {lacking}",
        where=str(folder),
        received=", ".join(there) or "an empty or absent folder",
        allowed=f"a folder with {CONFIG} and adapter_model.safetensors",
        fix="name a run with an adapter or its adapter/ folder, or get the adapter again",
    )


def no_butterflies(factor: int, lacking: str) -> AssetError:
    """The error for factors of BOFT that PEFT would leave out without a word, and train something else."""
    return AssetError(
        "asset-unsupported",
        f"boft_n_butterfly_factor: {factor} needs PEFT's extension for CUDA GPUs: {lacking}",
        where="adapter.boft_n_butterfly_factor",
        received=factor,
        allowed="1; more where a GPU is used and ninja and CUDA's compiler (nvcc) are installed",
        fix="set adapter.boft_n_butterfly_factor: 1, or install ninja and the CUDA toolkit",
    )


def adapter_values(folder: Path, declared: str) -> dict[str, Any]:
    """What an adapter's own config says, in the names of the config's section; only what its weights are bound to.

    Raises AssetError: asset-not-found when the folder holds no adapter, asset-damaged when its config is no JSON,
    asset-unsupported when it is of another type than the ``declared`` one.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise no_adapter(folder, CONFIG)
    try:
        said = json_reader.read(path)
        kind = str(said["peft_type"]).lower()
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(
            "asset-damaged",
            f"{CONFIG} cannot be read: {error}",
            where=str(path),
            received=f"{type(error).__name__}: {error}",
            allowed="a JSON object with peft_type",
            fix="get the adapter again",
        ) from error
    if kind != declared:
        raise AssetError(
            "asset-unsupported",
            "the adapter to go on from is of another type than the config says",
            where=str(folder),
            received=kind,
            allowed=declared,
            fix=f"set adapter.type: {kind}",
        )
    check_adapter(folder)
    values: dict[str, Any] = {}
    for ours, theirs in BOUND.items():
        found = next((said[name] for name in theirs if name in said), None)
        if ours == "init_lora_weights" and found in (True, False):
            found = "default"
        if ours == "alpha" and isinstance(found, float) and not found.is_integer():
            continue  # of a start whose scale is a root; it is read with the weights
        if found is not None:
            values[ours] = tuple(found) if isinstance(found, list) else found
    return values
