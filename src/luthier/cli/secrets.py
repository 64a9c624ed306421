"""Tokens of the environment never reach what a failure prints, whatever a library has put into its message."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|PROXY$", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value would hide words that are no secret
INSIDE_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")  # user:password


def hidden(text: str) -> str:
    """``text`` with each secret value replaced by the name of its variable."""
    for name, value in sorted(_secrets(), key=lambda pair: -len(pair[1])):
        text = text.replace(value, f"[{name}]")
    return INSIDE_URL.sub("[credentials]", text)


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if not NAMES.search(name):
            continue
        if name.upper().endswith("PROXY"):  # an address is none, what it is entered with is
            value = found[0] if (found := INSIDE_URL.search(value)) else ""
        if len(value) >= SHORTEST and not os.path.exists(value):  # *_TOKEN_PATH and the like name files
            yield name, value
