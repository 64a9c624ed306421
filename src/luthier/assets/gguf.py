"""A .gguf file becomes a safetensors folder once, kept in the cache under the hash of the file's content."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

from luthier import events
from luthier.assets import gguf_header
from luthier.assets.bars import BarStream
from luthier.assets.cache import build_once, cache_root, remembered_hash
from luthier.errors import AssetError

FORMAT = "1"  # part of the key: raise it when the conversion's result changes


def gguf_hash(path: Path, cache: Path | None = None) -> str:
    """The content of a GGUF file as a base: the same on every machine and with every version of the libraries."""
    return f"gguf{FORMAT}-{remembered_hash(path, cache_root(cache))}"


def convert_gguf(path: Path, *, cache: Path | None = None, sink: events.Sink = events.silent) -> Path:
    """The folder with the dequantised bf16 weights, config and tokenizer of a GGUF file.

    Raises AssetError asset-damaged for a file that cannot be read as GGUF.
    """
    try:
        gguf_header.check(path)
    except ValueError as error:
        raise _damaged(path, error) from error
    folder = cache_root(cache) / "bases" / gguf_hash(path, cache)

    def make(target: Path) -> None:
        with events.stage(sink, "convert", f"{path.name} to safetensors, once"):
            _convert(path, target, BarStream(sink, "convert", "tensors"))

    return build_once(folder, make)


def _convert(path: Path, target: Path, bar: BarStream) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(bar):  # its bar heeds no switch
            warnings.simplefilter("ignore")  # the loader's remarks on GGUF's own metadata say nothing to a user
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise _damaged(path, error) from error
        raise AssetError(
            "asset-unsupported",
            f"this GGUF file cannot be converted: {error}",
            where=str(path),
            received=path.name,
            allowed="a .gguf file of an architecture and quantisation that transformers reads",
            fix="use the original safetensors model, which GGUF files are made from",
        ) from error
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # the machine's, not the file's
            raise
        raise _damaged(path, error) from error  # the library trusts what the file says of itself
    finally:
        if bars:
            logging.enable_progress_bar()


def _damaged(path: Path, error: Exception) -> AssetError:
    return AssetError(
        "asset-damaged",
        f"the file cannot be read as GGUF: {error or type(error).__name__}",
        where=str(path),
        received=path.name,
        allowed="a whole .gguf file, which begins with b'GGUF'",
        fix="download it again, or name another file",
    )
