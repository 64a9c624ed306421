"""A base model's name → files on disk: hub cache, folder, GGUF, package. Without torch, except to convert."""

from luthier.assets.convert import convert_pickled
from luthier.assets.resolve import ALIASES, content_hash, file_hashes, not_found, refuse_no_name, resolve, terms_of
from luthier.assets.spec import read_spec

__all__ = [
    "ALIASES", "content_hash", "convert_pickled", "file_hashes", "not_found", "read_spec", "refuse_no_name", "resolve",
    "terms_of",
]  # fmt: skip
