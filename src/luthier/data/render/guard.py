"""Keeping text from data from becoming control tokens while a chat template handles it.

Before rendering, every piece of a message's text that is (or with its neighbours could become) a special-token string
is replaced with a plain ASCII word that stands nowhere else; after rendering the words are put back, and where they
stood is known to be data. Templates that trim, split or JSON-encode a message thereby keep working.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.assets.tokenizer import Tokenizer
from luthier.data.render.template import Rendered, Span


class Guard:
    """One conversation's replacements. Use `protect` on what goes into a template and `restore` on what comes out."""

    def __init__(self, tokenizer: Tokenizer, material: str) -> None:
        """``material``: the template and all the text, so that the stand-in words can be made unlike it."""
        self._tokenizer = tokenizer
        number = 0
        while f"zqx{number}z" in material.lower():
            number += 1
        self._stem = f"zqx{number}z"
        self.marker = self._stem + "answer"  # a word that stands nowhere in the conversation
        self._held: list[str] = []
        self.control = False  # whether the data spelt a whole special token

    def protect(self, value: Any) -> Any:
        """``value`` with every hazardous piece of its strings replaced, through lists and mappings."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> Rendered:
        """The text as it was meant, and which spans of it are data."""
        if not self._held:
            return Rendered(text)
        pieces: list[str] = []
        spans: list[Span] = []
        at = last = 0
        for match in re.finditer(self._stem + r"(\d+)q", text):
            literal, data = text[last : match.start()], self._held[int(match.group(1))]
            at += len(literal)
            spans.append((at, at + len(data)))
            pieces += [literal, data]
            at += len(data)
            last = match.end()
        return Rendered("".join([*pieces, text[last:]]), tuple(spans))

    def _protect_text(self, text: str) -> str:
        spans = self._tokenizer.hazards(text)
        if not spans:
            return text
        self.control = self.control or bool(self._tokenizer.find_special(text))
        out, last = [], 0
        for begin, end in spans:
            out += [text[last:begin], f"{self._stem}{len(self._held)}q"]
            self._held.append(text[begin:end])
            last = end
        return "".join([*out, text[last:]])
