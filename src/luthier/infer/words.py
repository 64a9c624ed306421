"""Settings that name tokens by their text: `logit_bias` and `bad_words` become ids, or an error that says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from luthier.errors import Fault

STRONGEST = 100.0  # beyond it a bias decides by itself


class Encodes(Protocol):
    """What is asked of `luthier.assets.tokenizer.Tokenizer`."""

    def encode(self, text: str, *, controls: bool = False, continuation: bool = False) -> list[int]:
        """Ids of a text that goes on from other text."""
        ...


def biases(value: Any, tokenizer: Encodes, where: str) -> tuple[tuple[tuple[int, float], ...], list[Fault]]:
    """(id, bias) of each key of ``logit_bias``, by id; a key of digits alone is an id, any other a text."""
    if not isinstance(value, Mapping):
        return (), [Fault("config-bad-value", "logit_bias maps tokens to numbers", where, value, "a mapping")]
    found: dict[int, float] = {}
    faults = []
    for key, bias in value.items():
        place = f"{where}.{key}"
        if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not abs(bias) <= STRONGEST:
            faults.append(Fault("config-bad-value", "a bias is a number", place, bias, "-100 to 100"))
            continue
        text = str(key)
        ids = [int(text)] if text.isascii() and text.isdigit() else tokenizer.encode(text, continuation=True)
        if len(ids) == 1:
            found[ids[0]] = found.get(ids[0], 0.0) + float(bias)
        else:
            faults.append(
                Fault(
                    "config-bad-value",
                    f"{text!r} is {len(ids)} tokens of this model, and a bias belongs to one",
                    place, text, "a token's id, or a text that is one token",
                    f"name its tokens by their ids: {', '.join(map(str, ids))}" if ids else "leave it out",
                )
            )  # fmt: skip
    return tuple(sorted(found.items())), faults


Banned = tuple[str, tuple[tuple[int, ...], ...]]  # a text, and the ids of its spellings


def banned(words: Any, tokenizer: Encodes, where: str) -> tuple[tuple[Banned, ...], list[Fault]]:
    """Each text with its ids by itself and after a space."""
    texts = (words,) if isinstance(words, str) else words
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text.strip() for text in texts):
        return (), [Fault("config-bad-value", "bad_words are texts", where, words, "texts that are not empty")]
    out = []
    for text in texts:
        ids = [tuple(tokenizer.encode(one, continuation=True)) for one in (text, f" {text.lstrip()}")]
        out.append((text, tuple(dict.fromkeys(one for one in ids if one))))
    return tuple(out), []


def banned_ids(extra: Mapping[str, Any]) -> list[list[int]] | None:
    """`bad_words_ids` with the ids of `bad_words`; None where there is neither."""
    every = [tuple(ids) for ids in extra.get("bad_words_ids") or ()]
    every += [ids for _, spellings in extra.get("bad_words") or () for ids in spellings]
    return [list(ids) for ids in dict.fromkeys(every)] or None
