"""How an answer is read as a class: the choice that it is, Ludwig's match rules, its own name, then the fallback."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.config import Config
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
    """Reads the answers of one category output.

    choices: the text that stands for each class, where answers are held to these; None where they are free.
    """

    classes: tuple[str, ...]
    rules: Mapping[str, Any]  # class → config.features.Match, in the order they are tried
    fallback: str | None
    choices: tuple[str, ...] | None = None

    @classmethod
    def of(cls, feature: Feature | None, classes: Sequence[str], *, held: bool = False, learned: bool = True) -> Reader:
        """The reader that an output feature declares.

        ``held``: answers are held to choices where the feature does not say otherwise. ``learned``: the model was
        trained on the classes as the data spells them; a model that was not is offered what the rules look for.
        """
        rules = feature.decoder.match if feature is not None and feature.decoder is not None else {}
        said = feature.constrained if feature is not None else None
        choices = tuple(one if learned else _spelled(one, rules) for one in classes)
        held = held if said is None else said
        fallback = feature.fallback_label if feature is not None else None
        # two classes that the same text stands for cannot be told apart by it
        distinct = len(set(choices)) == len(choices)
        return cls(tuple(classes), rules, fallback, (choices if distinct else tuple(classes)) if held else None)

    def read(self, answer: str, probabilities: Sequence[float] | None = None) -> str:
        """The class of an answer.

        One that names none is the fallback's; without a fallback the most probable class, where that is known, or
        the answer as it stands.
        """
        if self.choices is not None and trimmed(answer) in map(trimmed, self.choices):
            return self.classes[list(map(trimmed, self.choices)).index(trimmed(answer))]
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


def reader_of(config: Config, classes: Sequence[str] | None, *, learned: bool = True) -> Reader | None:
    """The reader of a config's output; None where it has no classes."""
    if classes is None:
        return None
    features = config.output_features
    return Reader.of(features[0] if features else None, classes, held=config.defaults != "ludwig", learned=learned)


def _spelled(name: str, rules: Mapping[str, Any]) -> str:
    """What a class is called where a prompt asks for it: the text that its rule looks for, else its name."""
    rule = rules.get(name)
    return rule.value if rule is not None and rule.type != "regex" else name
