"""A prompt with solved examples before it: the base model's fair chance, without any tuning."""

from __future__ import annotations

import random
from collections.abc import Sequence

Pair = tuple[str, str]  # a prompt as text, and its right answer


def few_shot(examples: Sequence[Pair], prompt: str, *, shots: int = 3, seed: int = 42, separator: str = "\n\n") -> str:
    """Solved examples and then ``prompt``, as one text; the same examples for every prompt of one seed.

    Args:
        examples: prompts and answers of training rows, in table order. Pass training rows only.
        prompt: the held-out row's prompt, as the template renders it.
        shots: how many examples to show; fewer where there are not as many.
        seed: picks the examples.
        separator: between two examples. An answer equal to it would never end, so it becomes a stop string well.
    """
    return separator.join([*(f"{question}{answer}" for question, answer in pick(examples, shots, seed)), prompt])


def pick(examples: Sequence[Pair], shots: int, seed: int) -> list[Pair]:
    """The examples shown, with different answers where the data has them (all classes before any class twice)."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    fresh: list[int] = []
    again: list[int] = []
    seen: set[str] = set()
    for at in order:
        (again if examples[at][1] in seen else fresh).append(at)
        seen.add(examples[at][1])
    return [examples[at] for at in (fresh + again)[:shots]]
