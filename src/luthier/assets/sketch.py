"""What can be known of a base model without its weights: enough to plan with, in seconds, also before it is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.assets.resolve import ALIASES, HUB_ALIASES, PATTERNS, TOKENIZERS, not_found, refuse_no_name, resolve
from luthier.assets.spec import DTYPES, read_json, read_spec, spec_of, weight_files
from luthier.types import ModelSpec

SMALL_FILES = [pattern for pattern in PATTERNS if pattern not in ("*.safetensors", "*.py")]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A base model from its headers. ``folder`` is None where not even its tokenizer is here; sizes in bytes.

    ``config``: its config.json, or what is known of it.
    """

    name: str
    spec: ModelSpec
    source: str
    folder: Path | None
    download: int = 0  # what has still to be fetched
    config: Mapping[str, Any] = field(default_factory=dict)


def sketch(name: str, *, trust_remote_code: bool = False) -> Sketch:
    """Headers of a base: from its files; from the hub's metadata when it is not here; from the list of known shapes.

    Hashes and loads nothing. Raises AssetError as `resolve` does, asset-not-found when nothing is known of it.
    """
    path = Path(name).expanduser()
    if (name in ALIASES and name not in HUB_ALIASES) or path.suffix.lower() == ".gguf":
        base = resolve(name, trust_remote_code=trust_remote_code)
        return _read(name, base.path, base.spec, base.source)
    if path.is_dir():
        if not (path / "config.json").is_file() or not weight_files(path):
            base = resolve(name, trust_remote_code=trust_remote_code)  # says what is wrong with the folder
            return _read(name, base.path, base.spec, base.source)
        return _read(name, path, read_spec(path), "folder")
    refuse_no_name(name)
    return _hub(name, HUB_ALIASES.get(name, name))


def _read(name: str, folder: Path, spec: ModelSpec, source: str) -> Sketch:
    """Of a model whose files are all here."""
    return Sketch(name, spec, source, _with_tokenizer(folder), config=read_json(folder / "config.json"))


def _hub(name: str, repository: str) -> Sketch:
    """The hub's cache, the hub's metadata, the list of known shapes: the first that knows the model."""
    from luthier.assets.shapes import known_config, known_shape

    cached = _snapshot(repository, online=False)
    if cached is not None and (cached / "config.json").is_file() and weight_files(cached):
        return _read(name, cached, read_spec(cached), f"hub cache, {repository}")
    looked = ["the hub cache"]
    try:
        return _from_metadata(name, repository)
    except _failures() as error:
        looked.append(f"the hub ({type(error).__name__})")
    spec = known_shape(repository)
    if spec is None:
        fix = "plan with a folder of the model, or when the hub can be reached"
        raise not_found(name, [*looked, "the list of known shapes"], fix=fix)
    tokenizer = None if cached is None else _with_tokenizer(cached)
    source, download = "the list of known shapes; the hub was not reached", 2 * spec.parameters
    return Sketch(name, spec, source, tokenizer, download, known_config(repository))


def _from_metadata(name: str, repository: str) -> Sketch:
    """Headers of the weights by range requests; only the small files are downloaded."""
    from huggingface_hub import get_safetensors_metadata

    found: Any = get_safetensors_metadata(repository)
    counts: dict[str, int] = dict(found.parameter_count)
    folder = _snapshot(repository, online=True)
    assert folder is not None
    common = max(counts, key=lambda kind: counts[kind])
    dtype = DTYPES.get(common, common.lower())
    config = read_json(folder / "config.json")
    spec = spec_of(config, sum(counts.values()), dtype)
    size = sum(count * (4 if kind == "F32" else 2) for kind, count in counts.items())
    return Sketch(name, spec, f"hub {repository}, not downloaded", _with_tokenizer(folder), size, config)


def _snapshot(repository: str, *, online: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=SMALL_FILES, local_files_only=not online))
    except _failures():
        if online:
            raise
        return None


def _failures() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    from luthier.assets.network import http_error

    return (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, NotASafetensorsRepoError, OfflineModeIsEnabled,
            OSError, http_error())  # fmt: skip


def _with_tokenizer(folder: Path) -> Path | None:
    return folder if any((folder / file).is_file() for file in TOKENIZERS) else None
