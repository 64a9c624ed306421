"""What a tokenizer from outside may take: time for a text, text made of text, time and memory to be loaded.

A tokenizer.json is somebody else's program too: its regular expressions backtrack, its normalizer may write a page for
each letter. The library gives up on one match after ten million steps, but not on a text, where each of its letters may
start such a match. It runs without holding Python back, so it is watched from here; what is overdue is left to itself
in a thread that ends with the process, since nothing can stop it. Loading does hold Python back, and may run the
normalizer: where it would, it is tried in a child process before.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.assets.template_worker import KEPT, limit
from luthier.errors import AssetError

if TYPE_CHECKING:
    import tokenizers

Result = TypeVar("Result")
PATIENCE = 10.0  # seconds for one call
PACE = 50_000.0  # characters a second that are allowed beyond it; real tokenizers take a million and more
GROWTH = 256  # characters that may come of one
MIXED = 2  # at most, of what a step that only writes characters differently makes of one
LOADING_MEMORY = 4 << 30  # bytes of address space of the child that tries to load one
LOADING_PACE = 1 << 20  # bytes of tokenizer.json a second that it is allowed beyond `PATIENCE`
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from luthier.assets import tokenizer_bounds; tokenizer_bounds.try_to_load(sys.argv[2], int(sys.argv[3]))"
)
# What loading runs the normalizer over, and normalizers that do nothing; a number is an entry of the vocabulary.
NORMALISED = re.compile(rb'"normalized"\s*:\s*true')
NOTHING = rb'null|\d|\{\s*"type"\s*:\s*"Sequence"\s*,\s*"normalizers"\s*:\s*\[\s*\]'
NORMALIZER = re.compile(rb'"normalizer"\s*:\s*+(?!' + NOTHING + rb")")
SPELLED = (rb"\u006", rb"\u007")  # small letters, by which a key could be hidden


def is_panic(error: BaseException) -> bool:
    """Whether the library gave up in its own language; such an error is no Exception."""
    return type(error).__name__ == "PanicException"


def in_time(work: Callable[[], Result], characters: int, where: str) -> Result:
    """What ``work`` returns, if it does in the time that ``characters`` may take.

    Raises:
        AssetError: ``asset-tokenizer-bounds`` when it takes longer or the tokenizer library gives up.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    patience = PATIENCE + characters / PACE
    thread = threading.Thread(target=run, name="tokenise", daemon=True)
    thread.start()
    thread.join(patience)
    if done:
        return done[0]
    if failed and not is_panic(failed[0]):
        raise failed[0]
    why = str(failed[0]) if failed else f"it takes longer than {patience:.0f} s"
    raise AssetError(
        "asset-tokenizer-bounds",
        f"the tokenizer exceeds its bounds on {characters:,} characters of text: {why}",
        where=where,
        received=f"{characters:,} characters of text",
        allowed="regular expressions in tokenizer.json that read text once, from left to right",
        fix="use the model of a publisher you trust; if the text is one very long word, split it",
    )


def check_loading(path: Path, content: bytes, settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json that takes minutes or gigabytes to load: the library then normalises its added tokens.

    Where there is nothing to normalise, which is seen in the bytes, nothing is tried.

    Raises:
        AssetError: ``asset-tokenizer-bounds``
    """
    declared = settings.get("added_tokens_decoder")
    more = declared.values() if isinstance(declared, Mapping) else ()
    added = NORMALISED.search(content) or any(isinstance(one, Mapping) and one.get("normalized") for one in more)
    if not (added and NORMALIZER.search(content)) and not any(letters in content for letters in SPELLED):
        return
    patience = PATIENCE + len(content) / LOADING_PACE
    command = [sys.executable, "-I", "-c", START, json.dumps(sys.path), str(path.parent), str(LOADING_MEMORY)]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    nothing = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, env=kept, timeout=patience)
    except subprocess.TimeoutExpired:
        why = f"it takes longer than {patience:.0f} s"
    else:
        if done.returncode == 0:
            return
        why = f"its process ended (it may use {LOADING_MEMORY >> 20} MiB)"
    raise AssetError(
        "asset-tokenizer-bounds",
        f"the tokenizer exceeds its bounds while it is loaded: {why}",
        where=str(path),
        received=f"a tokenizer.json of {len(content):,} bytes",
        allowed="a normalizer that reads each added token once, from left to right",
        fix="use the model of a publisher you trust",
    )


def try_to_load(folder: str, memory: int) -> None:
    """Load the tokenizer of ``folder`` in all its variants. Runs in the child; other faults are told by the parent."""
    from luthier.assets.tokenizer import Tokenizer

    limit(memory)
    try:
        Tokenizer.load(folder, tried=True).make_variants()
    except AssetError:
        return


def check_growth(backend: tokenizers.Tokenizer, where: str) -> None:
    """Refuse a tokenizer that could make gigabytes of a line of text.

    Raises:
        AssetError: ``asset-tokenizer-bounds``
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(getattr(backend, part)))
        grown = 1
        for step in steps:
            grown *= _growth(step)
        patterned = part == "decoder" and any("Regex" in (step.get("pattern") or {}) for step in steps)
        if grown > GROWTH or patterned:
            raise AssetError(
                "asset-tokenizer-bounds",
                f"the {part} of tokenizer.json "
                + ("runs a regular expression on each answer" if patterned else "can blow text up"),
                where=where,
                received=None if patterned else f"{min(grown, 10**18):,} characters of one",
                allowed="plain strings to replace" if patterned else f"at most {GROWTH} characters of one",
                fix="use the model of a publisher you trust",
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer, as its JSON has them, out of their sequences."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        node = waiting.pop()
        inner = [value for value in node.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if node.get("type") == "Sequence":
            waiting += [step for steps in inner for step in steps]
        else:
            yield node


def _growth(step: dict[str, Any]) -> int:
    """How many characters this step makes of one, at most."""
    kind = step.get("type")
    if kind == "Replace":
        found = step["pattern"].get("String")
        return max(1, -(-len(step["content"]) // len(found)) if found else 1 + len(step["content"]))
    if kind == "Prepend":
        return max(1, len(step["prepend"]))
    if kind == "Precompiled":  # a trie, and after it what its entries become, each ended by a zero
        table = base64.b64decode(step["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :].decode("utf-8", errors="replace")
        return max((len(text) for text in texts.split("\0")), default=1) or 1
    return MIXED if kind == "ByteLevel" else 1
