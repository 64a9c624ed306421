"""What is what in a table: which columns are the prompt, which one is learned, or which one holds conversations."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from luthier.data.conversation import conversation, is_conversation, is_list
from luthier.data.language import language_of
from luthier.data.layout import Kind, Layout
from luthier.data.render.template import plain_text
from luthier.data.sources.splits import SPLIT_COLUMN
from luthier.data.table import Table, missing_column
from luthier.errors import DataError

__all__ = ["detect", "language_of", "reference_of"]

# Known headings, lower case. The first triple or pair that a table has is what it is.
TRIPLES: tuple[tuple[str, str, str], ...] = tuple(
    (ask, given, answer)
    for ask, given in (
        ("instruction", "input"),
        ("instruction", "context"),
        ("question", "context"),
        ("query", "context"),
        ("prompt", "context"),
        ("指示", "入力"),
        ("指令", "输入"),
    )
    for answer in ("output", "response", "answer", "completion", "target", "出力", "输出")
)
PAIRS: tuple[tuple[str, str], ...] = tuple(
    (ask, answer)
    for ask, answers in (
        ("instruction", ("output", "response", "answer", "completion", "target")),
        ("prompt", ("completion", "response", "output", "answer", "target", "chosen")),
        ("question", ("answer", "response", "output", "completion")),
        ("query", ("answer", "response", "output")),
        ("input", ("output", "target", "response", "answer", "label")),
        ("source", ("target",)),
        ("text", ("label", "target", "output")),
        ("質問", ("回答", "答え")),
        ("問題", ("答え", "回答")),
        ("入力", ("出力",)),
        ("问题", ("答案", "回答")),
        ("指示", ("出力",)),
        ("指令", ("输出",)),
    )
    for answer in answers
)
CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TARGET_WORDS: tuple[str, ...] = (
    "target",
    "output",
    "label",
    "answer",
    "response",
    "completion",
    "category",
    "class",
    "queue",
    "reply",
)
TARGET_WORDS += ("result", "summary", "translation", "sentiment", "intent", "priority")
NOT_TEXT = re.compile(r"(^|[_\s-])(id|uuid|idx|index|split|url|timestamp|created_at|updated_at|date)$|^column_1$", re.I)
# What is told of a text, and seldom what is asked of it, though it has few values.
ABOUT = re.compile(r"(^|[_\s-])(source|lang|language|licen[cs]e|dataset|subset|domain|year|month|day|page)$", re.I)
LOOKED_AT = 200  # rows that decide whether a column holds conversations
MOST_SHOWN = 12  # columns that are named before the rest are counted
MOST_CLASSES, ROWS_PER_CLASS, LONGEST_CLASS = 50, 5, 100


def detect(
    table: Table,
    *,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    category: bool | None = None,
    exclude: Sequence[str] = (),
    written: Sequence[str] = (),
) -> Layout:
    """The layout of ``table``: as ``inputs`` and ``target`` say, else by known headings and contents, else a guess.

    ``category`` says whether the target is a class (None: found out); ``exclude`` names columns that are neither
    (a group, a date to split by), ``written`` what a template names. Columns that are no part of it are told.

    One input that is no column names the prompt that the template writes, as Ludwig has it: the template's columns
    are the inputs.

    Raises DataError ``data-missing-column`` or ``data-no-target``.
    """
    told = ""
    if (asked := _prompt_of(table, inputs or (), target, written)) and inputs:
        told = f"{inputs[0]!r} is no column but the prompt, which prompt.template makes of {', '.join(asked)}"
        inputs = asked
    for name in [*(inputs or ()), *([target] if target else [])]:
        if name not in table.columns:
            raise missing_column(name, table.columns, table.name)
    if target and target in (inputs or ()):
        others = [c for c in table.columns if c not in (*(inputs or ()), SPLIT_COLUMN)]
        raise DataError(
            "data-no-target",
            f"the column {target!r} is both input and target",
            where=f"input_features and output_features, for {table.name}",
            received=target,
            allowed=others or "a target that is no input",
            fix=f"leave {target!r} out of input_features, or name another column in output_features",
        )
    free = [c for c in table.columns if c != SPLIT_COLUMN and c not in exclude]
    layout = _said(table, free, inputs, target) if inputs or target else None
    layout = layout or _chat(table, free) or _conventional(table, free) or _meant_as_chat(table, free)
    layout = layout or _guessed(table, free)
    if told:
        layout = replace(layout, explanation=(told, *layout.explanation))
    if layout.kind not in ("chat", "text"):
        system = _named(free, ("system", "system_prompt"))
        if system and system not in (*layout.inputs, layout.target):
            layout = replace(layout, system=system, explanation=(*layout.explanation, f"system prompt: {system!r}"))
        layout = _with_classes(table, layout, category)
    used = (*layout.inputs, layout.target, layout.system, layout.tools, *written)
    return _telling_unused(layout, [c for c in free if c not in used])


def _prompt_of(table: Table, inputs: Sequence[str], target: str | None, written: Sequence[str]) -> tuple[str, ...]:
    """The columns of the template, where the one input is no column and the template says all that is asked."""
    written = [name for name in written if name != "__task__"]
    if len(inputs) != 1 or inputs[0] in table.columns or any(name not in table.columns for name in written):
        return ()
    return tuple(name for name in written if name != target)


def _telling_unused(layout: Layout, unused: list[str]) -> Layout:
    """A known heading must not hide what stands beside it: options of a question, a history, a second answer."""
    if not unused:
        return layout
    more = f" and {len(unused) - MOST_SHOWN} more" if len(unused) > MOST_SHOWN else ""
    return replace(layout, explanation=(*layout.explanation, f"not used: {', '.join(unused[:MOST_SHOWN])}{more}"))


def reference_of(row: Mapping[str, Any], layout: Layout) -> str | None:
    """The answer that the data gives for a row, as trained; None when it has none (running text has none)."""
    if layout.kind == "text" or layout.target is None:
        return None
    if layout.kind == "chat":
        turns = conversation(row, layout)
        answer = turns[-1].content if turns and turns[-1].role == "assistant" else ""
    else:
        answer = plain_text(row.get(layout.target))
    return answer if answer.strip() else None


def _said(table: Table, free: list[str], inputs: Sequence[str] | None, target: str | None) -> Layout | None:
    """The layout the caller names; a half that is not named is guessed."""
    if target and not inputs:
        if holds_chat(table, target):
            return Layout("chat", (), target, explanation=(f"conversations: {target!r}, as said",), tools=_tools(free))
        known = _known([*free, target] if target not in free else free)
        if known and known.target == target:
            return known
        rest = _texts(table, [c for c in free if c != target]) or [c for c in free if c != target]
        if not rest:
            return Layout("text", (), target, explanation=(f"text to learn: {target!r}, the only column",))
        lines = (f"inputs (a guess): {', '.join(rest)}", f"target: {target}, as said")
        return Layout("columns", tuple(rest), target, is_guess=True, explanation=lines)
    inputs = tuple(inputs or ())
    guess = target is None
    if target is None:
        rest = [c for c in free if c not in inputs]
        target = _named(rest, TARGET_WORDS) or (rest[0] if len(rest) == 1 else None)
        if target is None:
            raise _no_target(table, f"none of the columns beside {list(inputs)} is plainly the answer")
    known = _known([*inputs, target])
    kind: Kind = known.kind if known and known.target == target and set(known.inputs) == set(inputs) else "columns"
    if holds_chat(table, target):
        kind = "chat"
    lines = (f"inputs: {', '.join(inputs)}, as said", f"target: {target}" + (" (a guess)" if guess else ", as said"))
    return Layout(
        kind, inputs, target, is_guess=guess, explanation=lines, tools=_tools(free) if kind == "chat" else None
    )


def _chat(table: Table, free: list[str]) -> Layout | None:
    """One column with whole conversations, or a prompt and an answer that are both lists of turns."""
    holding = [c for c in free if holds_chat(table, c)]
    column = _named(holding, CHAT_COLUMNS)
    pair = next(((_named(holding, (a,)), _named(holding, (b,))) for a, b in PAIRS if {a, b} <= _lower(holding)), None)
    if column is None and pair and pair[0] and pair[1]:
        lines = (f"conversations: opened by {pair[0]!r}, answered by {pair[1]!r}",)
        return Layout("chat", (pair[0],), pair[1], explanation=lines, tools=_tools(free))
    column = column or (holding[0] if len(holding) == 1 else None)
    if column is None:  # a column of that name with turns in it, even if one cannot be understood: rendering says which
        named = _named(free, CHAT_COLUMNS)
        column = named if named and holds_chat(table, named, any_role=True) else None
    if column is None:
        return None
    lines = (f"conversations: {column!r}",)
    system, tools = _named(free, ("system", "system_prompt")), _tools(free)
    return Layout("chat", (), column, explanation=lines, system=system, tools=tools)


def _meant_as_chat(table: Table, free: list[str]) -> Layout | None:
    """A column with the name of conversations and lists in it that are none: rendering says what is wrong with them."""
    column = _named(free, CHAT_COLUMNS)
    if column is None or not any(map(is_list, _first_cells(table, column))):
        return None
    return Layout("chat", (), column, explanation=(f"conversations: {column!r}",), tools=_tools(free))


def _first_cells(table: Table, column: str) -> list[Any]:
    """The values of a column in the rows that decide what it holds, without those that are none."""
    values = Table(table.rows.slice(0, LOOKED_AT), table.name).column(column)
    return [value for value in values if value not in (None, "", [])]


def _conventional(table: Table, free: list[str]) -> Layout | None:
    """Known headings; but ``text`` beside a class is what the class is told from, not text to learn."""
    known = _known(free)
    return None if known and known.kind == "text" and _class_columns(table, free) else known


def _known(free: list[str]) -> Layout | None:
    """Headings that datasets of this field use."""
    names = {c.lower(): c for c in reversed(free)}
    for ask, given, answer in TRIPLES:
        if {ask, given, answer} <= names.keys():
            found = names[ask], names[given], names[answer]
            lines: tuple[str, ...] = (f"instruction: {found[0]!r}, its input: {found[1]!r}, learned: {found[2]!r}",)
            return Layout("instruction", found[:2], found[2], explanation=lines)
    for ask, answer in PAIRS:
        if {ask, answer} <= names.keys():
            kind: Kind = "instruction" if ask in ("instruction", "指示", "指令") else "completion"
            lines = (f"prompt: {names[ask]!r}, learned: {names[answer]!r}",)
            return Layout(kind, (names[ask],), names[answer], explanation=lines)
    if "text" in names and not names.keys() & set(TARGET_WORDS):
        return Layout("text", (), names["text"], explanation=(f"text to learn: {names['text']!r}",))
    return None


def _guessed(table: Table, free: list[str]) -> Layout:
    """No convention: the target by its name, else the last class or the last text; the other texts as inputs."""
    texts = _texts(table, free)
    if len(free) == 1:
        line = f"text to learn (a guess): {free[0]!r}, the only column"
        return Layout("text", (), free[0], is_guess=True, explanation=(line,))
    useful = [c for c in free if not NOT_TEXT.search(c)]
    target = _named(useful, TARGET_WORDS) or next(reversed(_class_columns(table, free) or texts), None)
    inputs = [c for c in texts if c != target] or [c for c in useful if c != target]
    if target is None or not inputs:
        raise _no_target(table, "no column looks like an answer to the others")
    lines = (f"inputs (a guess): {', '.join(inputs)}", f"target (a guess): {target}")
    return Layout("columns", tuple(inputs), target, is_guess=True, explanation=lines)


def _no_target(table: Table, why: str) -> DataError:
    return DataError(
        "data-no-target",
        f"what to learn from {table.name} cannot be told: {why}",
        where=table.name,
        received=table.columns,
        allowed="one column with the answers, beside those with the questions",
        fix="say it: luthier init DATA --input COLUMN,COLUMN --target COLUMN (input_features and output_features)",
    )


def _with_classes(table: Table, layout: Layout, category: bool | None) -> Layout:
    """The allowed answers, when the target is a class."""
    if category is False or layout.target is None:
        return layout
    classes = _classes(table, layout.target, said=bool(category))
    if classes is None:
        return layout
    line = f"classification: {len(classes)} answers in {layout.target!r}"
    return replace(layout, classes=classes, explanation=(*layout.explanation, line))


def _class_columns(table: Table, free: list[str]) -> list[str]:
    """The columns that look like a class."""
    return [c for c in free if not NOT_TEXT.search(c) and not ABOUT.search(c) and _classes(table, c)]


def _classes(table: Table, column: str, *, said: bool = False) -> tuple[str, ...] | None:
    """The values of a column, when it has few different ones and each stands in enough rows, or is ``said`` to."""
    from luthier.data.render.template import plain_text

    counts: Counter[str] = Counter()
    answered = 0
    for text in map(plain_text, table.values(column)):
        if not text.strip():
            continue
        answered += 1
        counts[text] += 1
        if not said and (len(counts) > MOST_CLASSES or len(text) > LONGEST_CLASS):
            return None
    rare = sum(count for count in counts.values() if count < ROWS_PER_CLASS)
    few = len(counts) >= 2 and answered >= ROWS_PER_CLASS * len(counts) and rare <= 0.05 * answered
    return tuple(sorted(counts)) if said or few else None


def spelled_alike(table: Table, layout: Layout) -> str | None:
    """What is told of classes that differ in case, width or blanks alone: answers are not told apart by these."""
    from luthier.data.render.template import plain_text

    alike: dict[str, list[str]] = {}
    for name in layout.classes or ():
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    if not several or layout.target is None:
        return None
    found = Counter(map(plain_text, table.values(layout.target)))
    shown = [
        "; ".join(" and ".join(f"{name!r} ({found[name]:,} rows)" for name in names) for names in several[:MOST_SHOWN])
    ]
    shown += [f"and {len(several) - MOST_SHOWN} more such groups"] if len(several) > MOST_SHOWN else []
    return (
        f"classes of {layout.target!r} that differ in case, width or blanks alone are learned as different answers: "
        f"{'; '.join(shown)}. If each is one class, write it in one way in the table"
    )


def one_answer(table: Table, layout: Layout, splits: Iterable[int] | None = None) -> str | None:
    """What is told where all training rows (without ``splits`` all rows) have the same answer, if they are no chats."""
    from luthier.data.render.template import plain_text

    if layout.target is None or layout.kind in ("chat", "text"):
        return None
    found, count = None, 0
    for value, side in zip(table.values(layout.target), splits if splits is not None else repeat(0), strict=False):
        text = plain_text(value)
        if side or not text.strip():
            continue
        if found not in (None, text):
            return None
        found, count = text, count + 1
    if found is None or count < 2:
        return None
    shown = found if len(found) <= LONGEST_CLASS else f"{found[:LONGEST_CLASS]}…"
    return (
        f"all {count:,} rows to learn from have one answer in {layout.target!r}: {shown!r}. There is nothing to tell "
        "apart: the model learns to say this whatever it is asked; add rows with other answers"
    )


def holds_chat(table: Table, column: str, *, any_role: bool = False) -> bool:
    """Whether the first rows of a column hold conversations; ``any_role``: whether one may be meant as such."""
    found = [is_conversation(cell, any_role=any_role) for cell in _first_cells(table, column)]
    return any(found) if any_role else bool(found) and all(found)


def _texts(table: Table, columns: list[str]) -> list[str]:
    """The columns of text that do not look like an identifier or a date."""
    sample = Table(table.rows.slice(0, LOOKED_AT), table.name)
    return [
        c
        for c in columns
        if not NOT_TEXT.search(c) and any(isinstance(v, str) and re.search(r"[^\W\d_]", v) for v in sample.column(c))
    ]


def _tools(free: list[str]) -> str | None:
    return _named(free, ("tools", "functions"))


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column, in any case."""
    known = {c.lower(): c for c in reversed(list(columns))}
    return next((known[name] for name in names if name in known), None)


def _lower(columns: Sequence[str]) -> set[str]:
    return {c.lower() for c in columns}
