"""What a tokenizer's files say: their JSON, the tokens that they declare special, the template, word-start marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier import json_reader
from luthier.errors import AssetError

if TYPE_CHECKING:
    import tokenizers

Mode = Literal["first", "later", "continuation"]
MODES: tuple[Mode, ...] = ("first", "later", "continuation")
# How a piece of text begins: at the very start of the ids, after a control token, or going on from other text. They
# differ only for tokenizers that put a word-start mark before text (Llama's dummy space).


def declare_specials(backend: tokenizers.Tokenizer, names: Sequence[str], settings: dict[str, Any]) -> None:
    """Make every token that the config calls special special in the backend, adding none that has no id."""
    from tokenizers import AddedToken

    decoder = settings.get("added_tokens_decoder") or {}
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        flags = {
            key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([AddedToken(entry["content"], **flags)])
        elif flags["special"]:
            backend.add_special_tokens([AddedToken(entry["content"], **flags)])
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for name in names:
        if name not in special and backend.token_to_id(name) is not None:
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])


def without_prefix(node: Any, mode: Mode) -> Any:
    """A tokenizer's JSON without the word-start marks that do not apply in ``mode``."""
    if mode == "first":
        return node
    out = {**node}
    for part in ("normalizer", "pre_tokenizer"):
        out[part] = _unmarked(node.get(part), mode)
    return out


def _unmarked(node: Any, mode: Mode) -> Any:
    if isinstance(node, list):
        return [kept for item in node if (kept := _unmarked(item, mode)) is not None]
    if not isinstance(node, dict):
        return node
    if mode == "continuation" and node.get("type") == "Prepend":
        return None
    out = {key: _unmarked(value, mode) for key, value in node.items()}
    if out.get("type") == "Metaspace" and (mode == "continuation" or out.get("prepend_scheme") == "first"):
        out["prepend_scheme"] = "never"
    if out.get("type") == "ByteLevel" and mode == "continuation":
        out["add_prefix_space"] = False
    return out


def content_of(token: Any) -> str | None:
    """The string of a token that a config writes as text or as a mapping."""
    return token.get("content") if isinstance(token, dict) else token


def template_of(settings: dict[str, Any]) -> str | None:
    """The chat template of a tokenizer_config.json, which may list several by name."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is none. Raises ``asset-damaged``."""
    if not path.is_file():
        return {}
    try:
        found = json_reader.read(path)
    except ValueError as error:
        raise AssetError(
            "asset-damaged",
            f"{path.name} is not valid JSON: {error}",
            where=str(path),
            received=str(error),
            allowed="a JSON object",
            fix="fetch the model again",
        ) from error
    return found if isinstance(found, dict) else {}
