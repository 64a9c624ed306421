"""Rows through plain templates: the config's own, or the default for the table's layout.

The defaults, for bases without a chat template:

    instruction   ### Instruction:⏎{instruction}⏎⏎### Input:⏎{input}⏎⏎### Response:⏎   (no Input part where it is empty)
    completion    {prompt}⏎
    columns       {name}: {value} on a line each, ⏎### Response:⏎
    text          nothing: the text itself is learned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.data.layout import Layout
from luthier.data.render.draft import Settings
from luthier.data.render.template import Rendered, Template, is_missing, parse, plain_text
from luthier.errors import DataError

Context = Callable[[Mapping[str, Any]], str]


class PlainRenderer:
    """Prompt text of a row, by the config's template or the layout's default."""

    def __init__(self, layout: Layout, settings: Settings, columns: tuple[str, ...], context: Context | None) -> None:
        """Raises DataError ``data-template`` or ``data-missing-column`` for a template that cannot be used."""
        self.layout, self.settings, self.context = layout, settings, context
        self.template: Template | None = None
        if settings.template is not None:
            self.template = parse(settings.template, columns, target=layout.target)
            if "__task__" in self.template.fields and settings.task is None:
                raise _unset("__task__", "prompt.task is not set", "set prompt.task, or take {__task__} out of it")
            if "__context__" in self.template.fields and context is None:
                fix = "put the passage into a column of the table and name that column in the template"
                raise _unset("__context__", "nothing is retrieved for it in this version of Luthier", fix)
            _require_rows(self.template, layout, columns)
        self._defaults = _defaults(layout)

    @property
    def fields(self) -> tuple[str, ...]:
        """What the config's own template names."""
        return self.template.fields if self.template is not None else ()

    @property
    def source(self) -> str:
        """What identifies this way of rendering."""
        if self.template is not None:
            return self.template.source
        return repr([t.parts for t in self._defaults])

    def prompt(self, row: Mapping[str, Any], where: str) -> Rendered:
        """The prompt of a row."""
        if self.template is not None:
            needed = set(self.template.fields)
            values: dict[str, Any] = {**row, "__task__": self.settings.task}
            if "__sample__" in needed:
                values["__sample__"] = sample(row, self.layout, where)
            if "__context__" in needed and self.context is not None:
                values["__context__"] = self.context(row)
            return self.template.render(values, where)
        full, short = self._defaults
        blank = len(self.layout.inputs) > 1 and not plain_text(row.get(self.layout.inputs[-1])).strip()
        rendered = (short if blank else full).render(row, where)
        absent = [name for name in self.layout.inputs if is_missing(row.get(name))]
        return Rendered(rendered.text, rendered.data, tuple(absent))


def _unset(field: str, why: str, fix: str) -> DataError:
    """A reserved field that nothing fills."""
    return DataError(
        "data-template",
        f"the template uses {{{field}}}, and {why}",
        where="prompt.template",
        received="{" + field + "}",
        allowed="{column} fields, {__sample__}, and {__task__} together with prompt.task",
        fix=fix,
    )


def _require_rows(template: Template, layout: Layout, columns: Sequence[str]) -> None:
    """Raise DataError ``data-template`` when every row would be asked the same; running text asks nothing."""
    if layout.kind in ("text", "chat") or set(template.fields) - {"__task__"}:
        return
    usable = layout.inputs or [name for name in columns if name != layout.target]
    shown = " ".join(f"{{{name}}}" for name in usable)
    raise DataError(
        "data-template",
        "the template names no column, so every row would be asked the same",
        where="prompt.template",
        received=template.source,
        allowed=f"text with fields, such as {shown} or {{__sample__}} (all inputs)",
        fix=f"put the columns that ask into it: {shown}",
    )


def sample(row: Mapping[str, Any], layout: Layout, where: str) -> str:
    """Ludwig's ``{__sample__}``: the input's value, or a line ``name: value`` for each of several inputs."""
    for name in layout.inputs:
        if name not in row:
            raise DataError(
                "data-missing-column",
                f"the row has no column {name!r}, which the prompt needs",
                where=where,
                received=list(row),
                allowed=name,
                fix=f"add a column {name!r}",
            )
    if len(layout.inputs) == 1:
        return plain_text(row[layout.inputs[0]])
    return "\n".join(f"{name}: {plain_text(row[name])}" for name in layout.inputs)


def _defaults(layout: Layout) -> tuple[Template, Template]:
    """The layout's default template, and the one for rows whose last input is empty."""
    names = layout.inputs
    if layout.kind == "instruction" and names:
        head = [("### Instruction:\n", names[0], "")]
        middle = [(f"\n\n### {_title(name)}:\n", name, "") for name in names[1:]]
        tail = [("\n\n### Response:\n", None, "")]
        return _made(head + middle + tail), _made(head + middle[:-1] + tail)
    if layout.kind == "columns" and names:
        lines = [(f"{'' if i == 0 else chr(10)}{name}: ", name, "") for i, name in enumerate(names)]
        both = _made([*lines, ("\n\n### Response:\n", None, "")])
        return both, both
    parts: list[tuple[str, str | None, str]] = [("" if i == 0 else "\n", name, "") for i, name in enumerate(names)]
    made = _made([*parts, ("\n", None, "")] if parts else [])
    return made, made


def _made(parts: list[Any]) -> Template:
    return Template("", tuple(parts))


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]
