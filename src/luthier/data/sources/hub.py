"""Datasets on the hub, by id: their Parquet files through huggingface_hub, else through ``datasets``.

Nothing from the dataset's repository is ever run.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from luthier import events
from luthier.assets.bars import download_bar
from luthier.assets.network import trust_own_bundle
from luthier.data.sources import memory, splits
from luthier.data.sources.formats import FORMATS, Options, tidied
from luthier.data.table import Table
from luthier.errors import DataError, missing_extra

ID = re.compile(r"(?:hf://(?:datasets/)?)?(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
CONVERTED = "refs/convert/parquet"  # where the hub keeps every dataset as {config}/{split}/NNNN.parquet


def is_id(text: str) -> bool:
    """Whether ``text`` reads as ``owner/name[:config][@revision]`` and not as the path of a file."""
    match = ID.fullmatch(text)
    return match is not None and PurePosixPath(match["id"]).suffix.lower() not in FORMATS and not text.startswith(".")


def read_hub(text: str, options: Options, sink: events.Sink = events.silent) -> Table:
    """The dataset of that id with its own splits. Raises DataError data-unreadable, DependencyError."""
    match = ID.fullmatch(text)
    assert match is not None, "call is_id first"
    trust_own_bundle()
    name, config, revision = match["id"], match["config"], match["revision"]
    files: dict[str, list[str]] = {}
    if revision is None:
        files = _converted(_listed(name, CONVERTED), name, config)
    if files:
        return _join(name, CONVERTED, files, options, sink)
    if config is None:
        files = _by_split(_listed(name, revision, required=True))
        if files:
            return _join(name, revision, files, options, sink)
    return _through_datasets(name, config, revision)


def _listed(name: str, revision: str | None, *, required: bool = False) -> list[str]:
    """The files of the repository at ``revision``; none when it lacks that revision and it is not required."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    try:
        return list(HfApi().list_repo_files(name, repo_type="dataset", revision=revision))
    except RevisionNotFoundError as error:
        if not required:
            return []
        raise _missing(name, f"it has no revision {revision!r}") from error
    except OfflineModeIsEnabled as error:
        try:
            folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
        except (OSError, ValueError):
            if not required:
                return []
            why = "HF_HUB_OFFLINE is set and it is not in the hub cache"
            raise _missing(name, why, ONLINE) from error
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    except (HfHubHTTPError, OSError) as error:
        raise _missing(name, str(error).strip().splitlines()[0]) from error


ONLINE = "unset HF_HUB_OFFLINE, or name a local file"
LOGIN = "check the spelling; for a private or gated dataset log in first: hf auth login"


def _missing(name: str, why: str, fix: str = LOGIN) -> DataError:
    return DataError(
        "data-unreadable",
        f"the hub dataset {name!r} cannot be read: {why}",
        where=f"no file of that name here, then the hub dataset {name}",
        received=name,
        allowed="an existing file, or a hub dataset id such as owner/name",
        fix=fix,
    )


def _converted(listed: list[str], name: str, config: str | None) -> dict[str, list[str]]:
    """Files by split, of the one configuration that is meant."""
    paths = [PurePosixPath(f) for f in listed if f.endswith(".parquet") and f.count("/") == 2]
    configs = sorted({p.parts[0] for p in paths})
    if not configs:
        return {}
    chosen = config or ("default" if "default" in configs else configs[0] if len(configs) == 1 else None)
    if chosen not in configs:
        raise DataError(
            "data-unreadable",
            f"the hub dataset {name!r} has several configurations"
            if chosen is None
            else f"no configuration {chosen!r}",
            where=name,
            received=config or "no configuration",
            allowed=configs,
            fix=f"name one: {name}:{configs[0]}",
        )
    files: dict[str, list[str]] = {}
    for path in sorted(p for p in paths if p.parts[0] == chosen):
        files.setdefault(path.parts[1].removeprefix("partial-"), []).append(str(path))
    return files


def _by_split(listed: list[str]) -> dict[str, list[str]]:
    """Data files of one format by the split that their name or folder says; all are ``train`` when none says."""
    skipped = {"dataset_infos.json", "dataset_info.json", "state.json", "config.json"}
    paths = [PurePosixPath(f) for f in listed if PurePosixPath(f).suffix.lower() in FORMATS]
    paths = [p for p in paths if p.name not in skipped]
    for suffix in (".parquet", ".jsonl", ".json", ".csv", ".tsv"):
        files: dict[str, list[str]] = {}
        for path in sorted(p for p in paths if p.suffix.lower() == suffix):
            words = [*re.split(r"[-_.]", path.stem.lower()), *path.parts[:-1]]
            part = next((w for w in words if w in splits.NAMES), "train")
            files.setdefault(part, []).append(str(path))
        if files:
            return files
    return {}


def _join(name: str, revision: str | None, files: dict[str, list[str]], options: Options, sink: events.Sink) -> Table:
    from huggingface_hub import hf_hub_download

    parts: dict[str, list[dict[str, Any]]] = {}
    told: dict[str, None] = {}
    for part, paths in sorted(files.items(), key=lambda item: splits.number(item[0]) or 0):
        for file in paths:
            bar = download_bar(sink, "fetch")
            local = Path(hf_hub_download(name, file, repo_type="dataset", revision=revision, tqdm_class=bar))
            reader = FORMATS.get(PurePosixPath(file).suffix.lower())
            table = tidied(reader(local, f"{name}/{file}", options))
            told.update(dict.fromkeys(table.notes))
            parts.setdefault(part, []).extend(table)
    rows, notes = splits.join(parts)
    return memory.from_rows(rows, name, [*told, *notes])


def _through_datasets(name: str, config: str | None, revision: str | None) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(
            "datasets", "hub", f"reading the hub dataset {name!r}, which has no plain files,"
        ) from error
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # its errors for what is missing, unknown or a script
        raise _missing(name, str(error).strip().splitlines()[0], ONLINE if HF_HUB_OFFLINE else LOGIN) from error
    return memory.from_parts({part: memory.as_rows(rows) or [] for part, rows in loaded.items()}, name)
