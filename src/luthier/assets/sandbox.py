"""Jinja's immutable sandbox with bounds: what chat templates from a model's files run in.

The sandbox refuses private attributes and mutation. Added here: loops count against one budget, `range`, repetition,
powers and padding cannot make large values. Imports Jinja, so it is imported only when a template is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RANGE = 20_000
MAX_VALUE = 1_000_000  # characters or items of one made value
MAX_STEPS = 100_000  # steps of one rendering over all its `range` loops
BUDGET: ContextVar[list[int]] = ContextVar("steps left in this rendering")


class Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks answers for trainers; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals["range"] = BoundedRange
        self.globals.pop("lipsum", None)
        for name in ("center", "indent"):
            self.filters[name] = _bounded_padding(self.filters[name])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic that could grow without limit is checked before it is done."""
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int) and len(text) * times > MAX_VALUE:
                    raise jinja2.TemplateError("a repetition makes too large a value")
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise jinja2.TemplateError("a power is too large")
        if operator == "%" and isinstance(left, str) and _wide(left):
            raise jinja2.TemplateError("a format is too wide")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """String methods that pad are bounded by their width."""
        padding = getattr(obj, "__name__", "") in ("center", "ljust", "rjust", "zfill", "expandtabs")
        if padding and any(isinstance(a, int) and a > MAX_VALUE for a in (*args, *kwargs.values())):
            raise jinja2.TemplateError("a padding is too wide")
        return super().call(context, obj, *args, **kwargs)


class BoundedRange(Sequence[int]):
    """`range` for templates: not long, and every step of every loop over it counts against the rendering's budget."""

    def __init__(self, *bounds: int) -> None:
        self._range = range(*bounds)
        if len(self._range) > MAX_RANGE:
            raise jinja2.TemplateError(f"range of {len(self._range):,} is longer than {MAX_RANGE:,}")

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        return self._range[index]

    def __iter__(self) -> Iterator[int]:
        budget = BUDGET.get()
        for item in self._range:
            budget[0] -= 1
            if budget[0] < 0:
                raise jinja2.TemplateError("the template loops too often")
            yield item


def _wide(pattern: str) -> bool:
    return any(int(number) > 1000 for number in re.findall(r"%[-+ #0]*(?:\*|(\d+))?", pattern) if number)


def _bounded_padding(function: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(value: Any, width: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(width, int) and width > 1000:
            raise jinja2.TemplateError("a padding is too wide")
        return function(value, *(() if width is None else (width,)), *args, **kwargs)

    return bounded
