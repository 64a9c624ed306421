"""Every error a user can meet, as one tree; each kind of cause has a stable code.

    LuthierError            exit 1    the root; nothing else is raised on purpose
    ├── ConfigError         exit 2    the YAML or dict
    ├── DataError           exit 3    the table, its rows, the rendering of them
    ├── AssetError          exit 4    the base model, its tokenizer, its files
    ├── RunError            exit 5    the run folder: lock, disk, checkpoints
    ├── TrainingError       exit 6    the training itself: not finite, no memory
    ├── DependencyError     exit 7    an optional package that is not installed
    └── Interrupted         exit 130 or 143    SIGINT or SIGTERM, after a checkpoint

A code is a slug such as ``config-unknown-key``. `CODES` holds what each says by itself; ``docs/errors/`` is
generated from it. Ctrl-C and SIGTERM end with 130 and 143, as shells expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luthier.error_codes import CODES
from luthier.secrets import hidden

LISTS = (list, tuple, set, frozenset)  # of what is allowed, each is told


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: what, where, what was received, what is allowed, how to mend it.

    ``where`` is a location in the user's own terms: ``config.yaml:12:3 trainer.learning_rat``,
    ``data.csv row 17 column output``. ``allowed`` and ``fix`` that are not said are those of the code.
    """

    code: str
    message: str
    where: str | None = None
    received: Any = None
    allowed: str | Sequence[str] | None = None
    fix: str | None = None

    def __post_init__(self) -> None:
        assert self.code in CODES, f"undeclared error code {self.code!r}: add it to luthier/error_codes.py"
        general = CODES[self.code]
        if self.allowed is None:
            object.__setattr__(self, "allowed", general.allowed)
        if self.fix is None:
            object.__setattr__(self, "fix", general.fix)

    def lines(self) -> list[str]:
        """The fault as plain lines of text, the message first. No line holds a secret (see `secrets`)."""
        out = [_text(self.message)]
        if self.where:
            out.append(f"where:    {_text(self.where)}")
        if self.received is not None:
            out.append(f"received: {_short(self.received)}")
        if self.allowed is not None:
            listed = self.allowed if isinstance(self.allowed, LISTS) else [self.allowed]
            out.append(f"allowed:  {', '.join(map(_text, listed))}")
        if self.fix:
            out.append(f"fix:      {_text(self.fix)}")
        return [hidden(line) for line in out]

    def to_json(self) -> dict[str, Any]:
        """The fault as JSON types, for ``--json``. No text holds a secret (see `secrets`)."""
        return {
            "code": self.code,
            "message": _told(self.message),
            "where": _told(self.where),
            "received": None if self.received is None else _short(self.received),
            "allowed": _told(self.allowed),
            "fix": _told(self.fix),
        }


@dataclass
class LuthierError(Exception):
    """A failure that is explained. Carries one or more faults; validation collects all of them."""

    faults: tuple[Fault, ...] = field(default=())
    exit_code: ClassVar[int] = 1

    def __init__(self, code: str | Sequence[Fault], message: str = "", **details: Any) -> None:
        """``XError("some-code", "what happened", where=…, received=…, allowed=…, fix=…)`` or ``XError([Fault, …])``."""
        faults = (Fault(code, message, **details),) if isinstance(code, str) else tuple(code)
        assert faults, "an error without a fault says nothing"
        super().__init__(faults)
        self.faults = faults

    @property
    def code(self) -> str:
        """The code of the first fault."""
        return self.faults[0].code

    def __str__(self) -> str:
        return "\n".join(f"[{fault.code}] " + "\n    ".join(fault.lines()) for fault in self.faults)


class ConfigError(LuthierError):
    """The config cannot be used as written."""

    exit_code = 2


class DataError(LuthierError):
    """The data cannot be read, split, rendered or supervised as asked."""

    exit_code = 3


class AssetError(LuthierError):
    """A base model or tokenizer cannot be found, is refused, or is damaged."""

    exit_code = 4


class RunError(LuthierError):
    """A run folder cannot be used: foreign files, another lock, no space, damage."""

    exit_code = 5


class TrainingError(LuthierError):
    """Training had to stop: a loss that is not finite, no memory left."""

    exit_code = 6


class Interrupted(LuthierError):
    """SIGINT or SIGTERM ended the training after a checkpoint; ``exit_code`` is 128 + the signal's number."""

    exit_code = 130

    def __init__(self, number: int, message: str, **details: Any) -> None:
        super().__init__("run-interrupted", message, **details)
        self.exit_code = 128 + number  # type: ignore[misc]


class DependencyError(LuthierError):
    """An optional package is needed; the fix names the extra to install."""

    exit_code = 7


def missing_extra(package: str, extra: str, purpose: str) -> DependencyError:
    """The one wording for an optional package that is not installed."""
    return DependencyError(
        "dependency-missing",
        f"{purpose} needs the package {package!r}, which is not installed",
        received=f"no package {package}",
        allowed=f"{package}, installed",
        fix=f"pip install 'luthier[{extra}]'   (or: pip install {package})",
    )


def _told(value: Any) -> Any:
    """``value`` as JSON types, without secrets."""
    if isinstance(value, LISTS):
        return [_told(one) for one in value]
    return None if value is None else hidden(_text(value))


def _text(value: Any) -> str:
    """Any value as text: a fault that cannot be told would hide what went wrong."""
    try:
        return value if isinstance(value, str) else str(value)
    except Exception:  # whatever a foreign type raises, such as ValueError for an int of many thousand digits
        return f"a {type(value).__name__} that cannot be shown"


def _short(value: Any, limit: int = 200) -> str:
    try:
        shown = value if isinstance(value, str) else repr(value)
    except Exception:
        shown = _text(value)
    text = hidden(shown)  # before it is cut: half a secret is still one
    return text if len(text) <= limit else text[: limit - 1] + "…"
