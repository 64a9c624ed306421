"""One folder of safetensors with the adapter folded into the base, for any program that reads transformers models."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from luthier.errors import AssetError, RunError
from luthier.events import Saved, Sink, silent, stage
from luthier.model.adapters import untie
from luthier.run import manifest
from luthier.run.staging import staged
from luthier.run.watch import growing

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def merged(
    model: Any,
    folder: Path | str,
    *,
    tokenizer_from: Path | str,
    dtype: str | None = None,
    replace: bool = False,
    sink: Sink = silent,
) -> Path:
    """Write the model with its adapter merged in; the model given stays as it was.

    The adapter is added in fp32 and the sum rounded once to ``dtype``: adding in bf16 would round twice and lose small
    changes. The folder appears complete or not at all, with the sums of its files, which whoever loads or uploads it
    here compares.

    Args:
        model: a PEFT model, or a plain transformers model (after full fine-tuning).
        folder: where to write; absent or empty, unless ``replace``.
        tokenizer_from: the base model's folder, whose tokenizer and generation files are copied.
        dtype: of the written weights (fp32, bf16 or fp16); None keeps the model's own.
        replace: take the place of what the folder holds, once the new one is whole.
        sink: told when the work begins and ends.

    Raises:
        AssetError: asset-unsupported, a base in 4 or 8 bit, or an adapter that cannot be merged.
        RunError: run-foreign-files, a folder that already holds something; run-in-use, it is being made already.
    """
    folder = Path(folder)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse_quantised(base)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            "run-foreign-files",
            "the folder for the merged model is not empty",
            where=str(folder),
            received=", ".join(sorted(path.name for path in folder.iterdir())[:5]),
            allowed="a folder that does not exist yet, or an empty one",
            fix="name another folder",
        )
    wanted = DTYPES[dtype] if dtype else next(p.dtype for p in base.parameters())
    with stage(sink, "merge", str(folder)), staged(folder) as made:
        plain = _merge(copy.deepcopy(model).to("cpu", torch.float32)).to(wanted)
        plain.config.dtype = wanted
        with growing(sink, "merge", made, sum(p.numel() * p.element_size() for p in plain.parameters())):
            plain.save_pretrained(made, safe_serialization=True)
        for name in TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.is_file():
                shutil.copyfile(source, made / name)
        manifest.write(made)
    sink(Saved(path=str(folder), step=0, what="merged model"))
    return folder


def _merge(model: Any) -> Any:
    """The plain model inside, adapters merged, every parameter checked to be finite."""
    if hasattr(model, "merge_and_unload"):
        untie(model)
        try:
            model = model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise AssetError(
                "asset-unsupported",
                f"this adapter cannot be merged into its base: {error}",
                received=str(error),
                allowed="adapters that change weights, such as lora, loha, lokr, oft, boft, ia3",
                fix="use the adapter folder itself instead of a merged model",
            ) from error
    return model


def _refuse_quantised(model: Any) -> None:
    method = getattr(model, "quantization_method", None)
    if method is None and not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", 0):
        return
    raise AssetError(
        "asset-unsupported",
        "an adapter cannot be merged into a quantised base: the rounded weights would lose it",
        received=str(getattr(method, "value", method) or "quantised weights"),
        allowed="a base loaded in fp32, bf16 or fp16",
        fix="load the base without `quantization`, put the adapter on it, and merge that",
    )
