"""Secrets never reach what is told: tokens of the environment, and what an address is entered with.

Whatever a library puts into its message, `hidden` takes them out; events and faults pass all their words through it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

NAMES = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|ACCOUNT)_?KEY|_KEY$|CONNECTION_STRING|PROXY$", re.IGNORECASE
)
SHORTEST = 8  # characters; a shorter value would hide words that are no secret
INSIDE_URL = re.compile(r"(?<=://)(?!\[)[^\s/@]+(?=@)")  # user:password, or a token alone; not what is hidden already
SIGNED_URL = re.compile(  # ?X-Amz-Signature=…, &sig=…, &access_token=…
    r"(?<=[?&])([\w.-]*(?:token|secret|signature|sig|passw\w*|credential|key|keyid)=)[^\s&'\"<>\[]+", re.IGNORECASE
)
_entered: set[str] = set()


def enter_with(url: str) -> None:
    """Hide what ``url`` is entered with (``s3://key:secret@bucket``) from now on, wherever a library quotes it."""
    rest = url.partition("://")[2]
    host = rest.partition("/")[0]
    within, at, _ = host.rpartition("@")
    if not at and ":" in host:  # a secret with a slash in it
        within, at, _ = rest.partition("@")
    for part in (within, *within.split(":", 1)) if at else ():
        _entered.update(text for text in (part, unquote(part)) if len(text) >= SHORTEST)


def hidden(text: str) -> str:
    """``text`` with each secret value replaced by the name of its variable, or by what it is."""
    for name, value in sorted(_secrets(), key=lambda pair: -len(pair[1])):
        text = text.replace(value, f"[{name}]")
    return SIGNED_URL.sub(r"\1[credentials]", INSIDE_URL.sub("[credentials]", text))


def _secrets() -> Iterator[tuple[str, str]]:
    yield from (("credentials", value) for value in _entered)
    for name, value in os.environ.items():
        if not NAMES.search(name):
            continue
        if name.upper().endswith("PROXY"):  # an address is none, what it is entered with is
            value = found[0] if (found := INSIDE_URL.search(value)) else ""
        if len(value) >= SHORTEST and not os.path.exists(value):  # *_TOKEN_PATH and the like name files
            yield name, value
