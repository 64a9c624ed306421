"""A single file that carries its own sha256: of all its bytes, with zeros where the sum itself stands.

For what a run keeps outside a folder with a manifest.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

OPEN = "0" * 64  # what the writer puts where the sum shall stand
_SUM = re.compile(rb'"sha256":\s*"([0-9a-f]{64})"')


def seal(content: bytes) -> bytes:
    """``content`` with its sum in the place of the first ``"sha256": "000…"``, which it must have."""
    found = _SUM.search(content)
    if found is None or found[1].decode() != OPEN:
        raise ValueError("there is no place for a sum")
    return _with(content, found, hashlib.sha256(content).hexdigest())


def fault(path: Path) -> str | None:
    """Why a sealed file is not as it was written; None: it is. Raises OSError."""
    content = path.read_bytes()
    found = _SUM.search(content)
    if found is None:
        return f"{path.name} has no sha256 of itself"
    if hashlib.sha256(_with(content, found, OPEN)).hexdigest() != found[1].decode():
        return f"{path.name} is not as its own sha256 says: it has changed"
    return None


def _with(content: bytes, found: re.Match[bytes], value: str) -> bytes:
    return content[: found.start(1)] + value.encode() + content[found.end(1) :]
