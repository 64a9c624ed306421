"""JSON that came from outside of this process: whatever is wrong with it is a ValueError, on every Python alike.

How deep Python reads differs by version and by how deep the caller stands, and what it has read it may not be able to
walk through. So nesting has a limit of our own, far below both: what is returned may be walked recursively.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_DEPTH = 200  # lists and objects in one another; the tokenizer library reads 128


def parse(text: str | bytes, **hooks: Any) -> Any:
    """The value that ``text`` holds; bytes are UTF-8. ``hooks`` as `json.loads` takes them.

    Raises:
        ValueError: it is no UTF-8, no JSON (then a `json.JSONDecodeError`, with line and column) or nests too deep.
    """
    if not isinstance(text, str):
        text = str(text, "utf-8")
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _too_deep(value):
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    return value


def read(path: Path) -> Any:
    """What a JSON file in UTF-8 holds. Raises ValueError as `parse` does, and for a file that cannot be read."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ValueError(str(error)) from error


def _too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (inner for node in level for inner in (node.values() if isinstance(node, dict) else node))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
    return bool(level)
