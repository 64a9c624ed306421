"""Chat templates, rendered as transformers renders them, in a sandbox and within bounds.

A template comes from a model's files, so it is untrusted: Jinja's immutable sandbox keeps it from attributes and
mutation, and sizes are limited (template, output, loop length). Time and memory cannot be limited from within, so all
of this runs in the child process of `template_worker`; call that. `DATE` makes `strftime_now` answer the same at
training and at prediction, whenever those happen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from luthier import numbers
from luthier.errors import DataError

if TYPE_CHECKING:
    import jinja2

MAX_TEMPLATE = 200_000  # characters
MAX_OUTPUT = 4_000_000  # characters of one rendered conversation
DATE = datetime(2024, 7, 26)  # the day that templates such as Llama 3's fall back to


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
    now: datetime = DATE,
    where: str | None = None,
    copied: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation. ``variables`` reach the template as they are.

    ``copied``: the messages are the caller's own copy, of JSON types only, which nothing else can reach.

    Raises:
        DataError: ``data-chat`` when the template refuses the conversation or exceeds its bounds.
        DataError: ``data-template`` when the template itself cannot be compiled.
    """
    import jinja2

    from luthier.assets.sandbox import BUDGET, MAX_STEPS

    compiled = _compile(template)
    BUDGET.set([MAX_STEPS])
    clock = _clock(now)
    context = {
        "messages": list(messages) if copied else numbers.loads(numbers.dumps([dict(m) for m in messages])),
        "tools": list(tools) if tools else None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": clock,
        **({"bos_token": bos_token} if bos_token is not None else {}),
        **({"eos_token": eos_token} if eos_token is not None else {}),
        **variables,
    }
    pieces: list[str] = []
    size = 0
    try:
        for piece in compiled.generate(context):
            size += len(piece)
            if size > MAX_OUTPUT:
                _stop(f"the template writes more than {MAX_OUTPUT:,} characters")
            pieces.append(piece)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise DataError(
            "data-chat",
            f"the chat template cannot render this conversation: {error}",
            where=where,
            received=" → ".join(str(m.get("role")) for m in messages) or "no messages",
            allowed="roles in the order that the template expects",
            fix="bring the roles into the order that the template expects, or set prompt.chat_template to another one",
        ) from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise DataError(
            "data-chat",
            f"the chat template exceeds its bounds: {type(error).__name__}",
            where=where,
            received=type(error).__name__,
            allowed="a template without unbounded recursion",
            fix="set prompt.chat_template to a template without unbounded recursion",
        ) from error
    return "".join(pieces)


def check_template(template: str, where: str | None = "prompt.chat_template") -> None:
    """Raise ``data-template`` when a chat template is too large or malformed."""
    _compile(template, where)


def _compile(template: str, where: str | None = None) -> jinja2.Template:
    import jinja2

    if len(template) > MAX_TEMPLATE:
        raise DataError(
            "data-template",
            "the chat template is too large",
            where=where,
            received=f"{len(template):,} characters",
            allowed=f"at most {MAX_TEMPLATE:,} characters",
            fix="shorten it, or leave prompt.chat_template out to use the model's own",
        )
    try:
        return _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            "data-template",
            f"the chat template is not valid Jinja: {error.message}",
            where=f"{where or 'chat template'}, line {error.lineno}",
            received=(template.splitlines()[error.lineno - 1 : error.lineno] or ["the end of the template"])[0].strip(),
            allowed="a Jinja template, as transformers' chat templates are",
            fix="correct the template, or leave prompt.chat_template out to use the model's own",
        ) from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Jinja as transformers sets it up: trimmed blocks, loop controls, JSON without HTML escapes."""
    from luthier.assets.sandbox import BoundedSandbox, Generation

    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _stop
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return numbers.written(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _stop(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _clock(now: datetime) -> Callable[[str], str]:
    return lambda format: now.strftime(format)
