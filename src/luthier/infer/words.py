"""Settings that name tokens by their text: `logit_bias` and `bad_words` become ids, or an error that says why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from luthier.errors import Fault

STRONGEST = 100.0  # beyond it a bias decides by itself


class Encodes(Protocol):
    """What is asked of `luthier.assets.tokenizer.Tokenizer`."""

    def encode(self, text: str, *, controls: bool = False, continuation: bool = False) -> list[int]:
        """Ids of a text that goes on from other text."""
        ...


def biases(
    value: Mapping[str, float], tokenizer: Encodes, where: str
) -> tuple[tuple[tuple[int, float], ...], list[Fault]]:
    """(id, bias) of each key of ``logit_bias``, by id; a key of digits alone is an id, any other a text."""
    found: dict[int, float] = {}
    faults = []
    for text, bias in value.items():
        place = f"{where}.{text}"
        if abs(bias) > STRONGEST:
            faults.append(Fault("config-bad-value", "a bias is a number of this range", place, bias, "-100 to 100",
                                "give a number of this range"))  # fmt: skip
            continue
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


def banned(texts: Sequence[str], tokenizer: Encodes, where: str) -> tuple[tuple[Banned, ...], list[Fault]]:
    """Each text with its ids by itself and after a space."""
    if not all(text.strip() for text in texts):
        fix = "write each as a text: [first, second]"
        return (), [Fault("config-bad-value", "bad_words are texts", where, texts, "texts that are not empty", fix)]
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


def beyond(extra: Mapping[str, Any], vocabulary: int) -> list[Fault]:
    """Of each key that names tokens by their ids, the first one that a model of so many tokens does not have."""
    wrong: dict[str, int] = {}
    for key, token in _tokens(extra):
        if not 0 <= token < vocabulary:
            wrong.setdefault(key, token)
    return [
        Fault(
            "config-bad-value",
            f"generation.{key} names {token}, an id outside the model's vocabulary of {vocabulary}",
            f"generation.{key}", token, f"0 to {vocabulary - 1}",
        )
        for key, token in wrong.items()
    ]  # fmt: skip


def _tokens(extra: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(key, id) of every token that the settings name."""
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        if extra.get(key) is not None:
            yield key, extra[key]
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        yield from ((key, token) for token in extra.get(key) or ())
    sequences = {
        "bad_words_ids": extra.get("bad_words_ids") or (),
        "bad_words": [ids for _, spellings in extra.get("bad_words") or () for ids in spellings],
        "sequence_bias": [ids for ids, _ in extra.get("sequence_bias") or ()],
        "logit_bias": [(token,) for token, _ in extra.get("logit_bias") or ()],
    }
    yield from ((key, token) for key, every in sequences.items() for ids in every for token in ids)
