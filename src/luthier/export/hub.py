"""Uploading a folder to the Hugging Face hub. Proxies, HF_ENDPOINT and tokens are huggingface_hub's own business."""

from __future__ import annotations

from pathlib import Path

from luthier.assets.network import trust_own_bundle
from luthier.errors import AssetError, RunError
from luthier.events import Sink, Warned, silent, stage
from luthier.export.card import SAMPLES, has_samples
from luthier.run import manifest, verify
from luthier.run.atomic import leads_out

# Training state and logs stay at home; so does anything pickled.
LEFT_OUT = ("checkpoints/**", "metrics.jsonl", "*.lock", ".*", "**/.*", "*.bin", "*.pt", "*.pth", "*.pkl", "optimizer*")
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def upload(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload a model tuned with Luthier",
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    sink: Sink = silent,
) -> str:
    """Upload an adapter folder or a merged model; returns the commit's address.

    Args:
        folder: holds adapter_model.safetensors or model.safetensors at its top.
        repo_id: ``owner/name``; made when it does not exist.
        private: whether a newly made repository is private.
        token: a token with the right to write; None takes the one that is logged in.
        commit_message: the commit's first line.
        commit_description: the rest of the commit's message.
        revision: the branch; None is the main one.
        create_pr: open a pull request instead of committing.
        sink: told when the upload begins and ends, and that the card shows rows where it does; between them the hub's
            client draws its own progress.

    Raises:
        RunError: run-not-a-run, a folder without weights in safetensors; run-damaged, one with links out of it or
            files that are not as its manifest says.
        AssetError: asset-upload, a name the hub does not take, no right to write, or no way to the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # Which HTTP library is beneath differs between versions of huggingface_hub; its own error is always built on it.
    http_error: type[Exception] = HfHubHTTPError.__mro__[1]
    folder = _publishable(Path(folder))
    if has_samples(folder):
        told = f"README.md shows a few rows of the data under {SAMPLES!r}; whoever sees the repository sees them"
        sink(Warned(text=told))
    trust_own_bundle()
    api = HfApi(token=token)
    try:
        with stage(sink, "upload", repo_id):
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=list(LEFT_OUT),
            )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, http_error) as error:
        raise AssetError(
            "asset-upload",
            f"the hub did not take the upload: {(str(error).splitlines() or [type(error).__name__])[0]}",
            received=repo_id,
            allowed="owner/name, with a token that may write there",
            fix="unset HF_HUB_OFFLINE"
            if isinstance(error, OfflineModeIsEnabled)
            else "log in with `hf auth login`, or pass token=; check that the owner's name is yours",
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _publishable(folder: Path) -> Path:
    """The folder, when it holds weights in safetensors and nothing from outside of it.

    Raises RunError run-not-a-run, run-damaged.
    """
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise RunError(
            "run-not-a-run",
            "there are no weights to upload here",
            where=str(folder),
            received="a folder without weights",
            allowed=WEIGHTS,
            fix="name the run's adapter folder or a merged model",
        )
    if outside := sorted(one.name for one in folder.rglob("*") if leads_out(one, [folder.resolve()])):
        raise RunError(
            "run-damaged",
            "files of this folder are links to files outside of it, which an upload would publish",
            where=str(folder),
            received=", ".join(outside[:3]),
            allowed="files in the folder",
            fix="replace each link by a copy of the file, or remove it",
        )
    if (folder / manifest.NAME).is_file() and (faults := verify.faults_of(folder)):
        raise RunError(
            "run-damaged",
            f"this is not the model that was written here: {faults[0]}",
            where=str(folder),
            received="; ".join(faults[:5]),
            allowed="the files that training or merging wrote",
            fix=f"restore them from a copy, or make them again; what was changed on purpose: delete {manifest.NAME}",
        )
    return folder
