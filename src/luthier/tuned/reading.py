"""How an answer is read as a class: Ludwig's match rules first, then the class's own name, then the fallback."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.config.features import Feature
from luthier.metrics import normal_class
from luthier.metrics.text import trimmed

Test = Callable[[str, str], bool]
# (answer, value) → whether they match; Ludwig's `contains` tells cases apart
MATCHES: Mapping[str, Test] = {
    "contains": lambda answer, value: value in answer,
    "equals": lambda answer, value: trimmed(answer) == trimmed(value),
    "regex": lambda answer, value: re.search(value, answer) is not None,
}


@dataclass(frozen=True)
class Reader:
    """Reads the answers of one category output."""

    classes: tuple[str, ...]
    rules: Mapping[str, Any]  # class → config.features.Match, in the order they are tried
    fallback: str | None

    @classmethod
    def of(cls, feature: Feature | None, classes: Sequence[str]) -> Reader:
        """The reader that an output feature declares."""
        decoder = feature.decoder if feature is not None else None
        rules = decoder.match if decoder is not None else {}
        return cls(tuple(classes), rules, feature.fallback_label if feature is not None else None)

    def read(self, answer: str, probabilities: Sequence[float] | None = None) -> str:
        """The class of an answer.

        One that names none is the fallback's; without a fallback the most probable class, where that is known, or
        the answer as it stands.
        """
        for name, rule in self.rules.items():
            if MATCHES[rule.type](answer, rule.value):
                return name
        named = normal_class(answer, self.classes)
        if named in self.classes:
            return named
        if self.fallback is not None:
            return self.fallback
        if probabilities is not None:
            return max(zip(probabilities, self.classes, strict=True))[1]
        return named
