"""What a base that is not in the catalogue says of its licence: its card, the licence beside it, the hub's answer.

Nothing here decides anything: a licence that asks for something is told before the base is fetched or loaded, and its
terms are for a person to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.assets.network import http_error, trust_own_bundle
from luthier.config import yaml_reader
from luthier.errors import ConfigError

# Licences that ask for no more than their notice to be kept, by the hub's identifiers.
PERMISSIVE = frozenset(
    ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "0bsd", "isc", "zlib", "unlicense", "cc0-1.0", "wtfpl")
)
UNNAMED = ("", "none", "null", "unknown", "unlicensed")  # words for "no licence is named"
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
# How texts of licences begin, or what they say where they begin with whose they are.
TEXTS = (
    ("apache license version 2.0", "apache-2.0"),
    ("permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    ("redistribution and use in source and binary forms", "bsd"),
)
MOST = 2**16  # bytes of a card or a licence that are read
LONGEST = 80  # characters of a licence's name
PATIENCE = 10.0  # seconds for the hub's answer


def terms(licence: str, place: str, *, gated: bool = False) -> str | None:
    """What has to be done before a base may be used, on one line; None for a permissive licence without a gate."""
    if gated:
        return f"GATED: accept the licence ({licence}) at {place} and run `hf auth login` first"
    asks = not PERMISSIVE.issuperset(licence.lower().split(", "))
    return f"LICENCE-BOUND ({licence}): read its terms at {place}" if asks else None


def of_folder(folder: Path) -> str | None:
    """`terms` of a model's folder: by the front matter of its README.md, else by the text of its licence.

    None where neither is there, says nothing or cannot be read: a card is no reason to refuse a model.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    card = _front_matter(_begin(folder / "README.md"))
    if (named := _named(card)) is not None:
        return terms(named, _link(card) or str(file or folder / "README.md"))
    text = _begin(file) if file is not None else ""
    head = " ".join(text.lower().split())[:1000]
    known = next((name for said, name in TEXTS if said in head), None)
    first = known or next((_short(line) for line in text.splitlines() if _short(line)), None)
    return None if first is None else terms(first, str(file))


def of_hub(repository: str) -> str | None:
    """`terms` of a repository on the hub: from the card in the hub's cache, else by asking the hub, once.

    Offline nothing is asked. None where nothing is known; what is wrong with the hub is told by the fetch that follows.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        cached = try_to_load_from_cache(repository, "README.md")
        if isinstance(cached, str):
            return of_folder(Path(cached).parent)
        trust_own_bundle()
        found = HfApi().model_info(repository, timeout=PATIENCE)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, http_error(), ValueError, KeyError, TypeError):
        return None  # the last three: an answer that is not the hub's
    card = found.card_data.to_dict() if found.card_data is not None else {}  # type: ignore[no-untyped-call]
    named, page = _named(card), f"https://huggingface.co/{repository}"
    if named is None and not found.gated:
        return None
    return terms(named or "its own", page if found.gated else _link(card) or page, gated=bool(found.gated))


def _begin(path: Path) -> str:
    """The beginning of a text file; empty where there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MOST).decode("utf-8", "replace")
    except OSError:
        return ""


def _front_matter(text: str) -> Mapping[str, Any]:
    """The YAML between two lines of dashes at the head of a card."""
    head, *rest = text.removeprefix("\ufeff").splitlines()[:2000] or [""]
    if head.rstrip() != "---" or "---" not in (lines := [line.rstrip() for line in rest]):
        return {}
    try:
        data = yaml_reader.read("\n".join(lines[: lines.index("---")]) + "\n", "README.md").data
    except ConfigError:
        return {}
    return data if isinstance(data, dict) else {}


def _named(card: Mapping[str, Any]) -> str | None:
    """The licence's name; for the hub's `other` the one that the card gives it."""
    given = card.get("license")
    several = given if isinstance(given, list) else [given]
    named = ", ".join(_short(one) for one in several if _short(one).lower() not in UNNAMED)
    if named.lower() == "other":
        named = _short(card.get("license_name")) or named
    return named or None


def _link(card: Mapping[str, Any]) -> str | None:
    link = str(card.get("license_link") or "")
    return link if link.startswith("https://") and len(link) < 200 and link.isprintable() and " " not in link else None


def _short(value: Any) -> str:
    """A name on one line, whatever the card has put there."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return ""
    return "".join(letter for letter in " ".join(str(value).split()) if letter.isprintable())[:LONGEST].strip("#* ")
