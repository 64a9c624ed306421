"""A name → factory table with suggestions: how adapters, objectives, metrics, optimizers and data sources are found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from luthier.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name closest to ``name``, if any is close enough to be meant."""
    found = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    return next((k for k in known if k.lower() == found[0]), None) if found else None


class Registry(Generic[T]):
    """Named things of one kind. Registering is a decorator; an unknown name lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Register under one or more names; a name is taken once."""

        def add(item: T) -> T:
            for name in names:
                assert name not in self._items, f"{self.kind} {name!r} is registered twice"
                self._items[name] = item
            return item

        return add

    def get(self, name: str, where: str | None = None) -> T:
        """The item of that name. Raises ConfigError with the nearest known name otherwise."""
        if name in self._items:
            return self._items[name]
        close = nearest(name, list(self._items))
        raise ConfigError(
            "config-bad-value",
            f"there is no {self.kind} named {name!r}",
            where=where,
            received=name,
            allowed=sorted(self._items),
            fix=f"did you mean {close!r}?" if close else "name one of these",
        )

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
