"""A row that holds a conversation as a list of `Message`: OpenAI's messages, ShareGPT's from/value, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import json_reader, numbers
from luthier.data.layout import Layout
from luthier.errors import DataError
from luthier.types import Message

ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",  # ShareGPT's turn that is one call: it becomes an assistant's
    "tool_call": "function_call",
}
# An object may hold a turn under each of these: {"human": …, "assistant": …}. Words that name other things are none.
SPEAKERS = {name: role for name, role in ROLES.items()
            if role in ("system", "user", "assistant") and name not in ("instruction", "model")}  # fmt: skip
ORDER = ("system", "user", "assistant")  # in which they are said
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "thinking")  # as chat templates name what an answer was thought out with
WEIGHT_KEYS = ("weight", "train")
READ = {*ROLE_KEYS, *CONTENT_KEYS, *WEIGHT_KEYS, "tool_calls", "function_call", "tool_call_id", "name"}


def conversation(row: Mapping[str, Any], layout: Layout, where: str = "the row") -> list[Message]:
    """The turns of a chat row, in order; none when its columns are empty. Raises DataError ``data-chat``."""
    columns = dict.fromkeys([*layout.inputs, *([layout.target] if layout.target else [])])
    turns: list[Message] = []
    for column in columns:
        place = f"{where} column {column}"
        for number, turn in enumerate(turn_list(row.get(column), place)):
            turns.append(_message(turn, f"{place} turn {number + 1}"))
    system = row.get(layout.system) if layout.system else None
    said = _text(system, f"{where} column {layout.system}")
    if said.strip() and not (turns and turns[0].role == "system"):
        turns.insert(0, Message("system", said))
    return turns


def tools_of(row: Mapping[str, Any], layout: Layout, where: str = "the row") -> list[dict[str, Any]] | None:
    """The tools that the row's conversation may call, as chat templates take them; None when it has none."""
    value = row.get(layout.tools) if layout.tools else None
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _json(value, f"{where} column {layout.tools}")
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise _fault(f"{where} column {layout.tools}", "the tools are not a list of objects", value)
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value]


def turn_list(value: Any, where: str) -> list[Any]:
    """The raw turns of one cell: a list, JSON text of a list, an object with ``messages`` inside, or nothing."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _json(value, where)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if value is None:
        return []
    if not isinstance(value, list):
        raise _fault(where, "a conversation is not a list of turns", value)
    return [turn for item in value for turn in (_spoken(item) or [item])]


def _spoken(item: Any) -> list[dict[str, Any]]:
    """The turns of an object whose keys are their speakers; none of any other, or where two of them are one role."""
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        return []
    said = {SPEAKERS.get(key.strip().lower()): text for key, text in item.items()}
    if None in said or len(said) < len(item):
        return []
    return [{"role": role, "content": said[role]} for role in ORDER if role in said]


def is_conversation(value: Any, *, any_role: bool = False) -> bool:
    """Whether a cell looks like a conversation: a list of objects that each name a role, or speakers. Never raises.

    ``any_role``: roles that nobody knows count too; the column's name already says what it is meant to be.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = json_reader.parse(value)
        except ValueError:
            return False
    if not isinstance(value, list) or not value:
        return False
    if any_role:
        return all(isinstance(turn, Mapping) and any(isinstance(turn.get(k), str) for k in ROLE_KEYS) for turn in value)
    if all(isinstance(turn, Mapping) and any(str(turn.get(key)) in ROLES for key in ROLE_KEYS) for turn in value):
        return True
    spoken = [_spoken(turn) for turn in value]
    return all(spoken) and {"user", "assistant"} <= {turn["role"] for turns in spoken for turn in turns}


def is_list(value: Any) -> bool:
    """Whether a cell is a list, or JSON text of one. Never raises."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json_reader.parse(value)
        except ValueError:
            return False
    return isinstance(value, list)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _fault(where, "a turn is not an object with role and content", turn)
    named = _first(turn, ROLE_KEYS)
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise _fault(where, "a turn has an unknown role" if named is not None else "a turn names no role", named, ROLES)
    content = _text(_first(turn, CONTENT_KEYS), where)
    thought = {key: turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str) and turn[key].strip()}
    unread = tuple(key for key, value in turn.items() if value and key not in READ and key not in thought)
    if role == "function_call":
        made, trained = _calls(_json(content, where), where), _trained(turn, where)
        return Message("assistant", "", tool_calls=made, trained=trained, reasoning=thought, unread=unread)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls and role != "assistant":
        raise _fault(where, f"a {role} turn calls a tool", calls)
    said_nothing = role == "assistant" and any(key in turn for key in CONTENT_KEYS)  # null is an empty answer
    if _first(turn, CONTENT_KEYS) is None and not calls and not said_nothing:
        raise _fault(where, "a turn has no content", dict(turn))
    return Message(
        role=role,
        content=content,
        tool_calls=_calls(calls, where) if calls else (),
        tool_call_id=_optional(turn, "tool_call_id", where),
        name=_optional(turn, "name", where),
        trained=_trained(turn, where),
        reasoning=thought,
        unread=unread,
    )


def _first(turn: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _optional(turn: Mapping[str, Any], key: str, where: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise _fault(where, f"{key} is not text", value)
    return value


def _text(content: Any, where: str) -> str:
    """Content as text; a list of parts is joined when all of them are text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if part is not None)
        raise _fault(where, "a turn holds a part that is not text; only text is supported", content)
    if isinstance(content, Mapping):  # a tool's answer given as an object
        return numbers.dumps(content)
    raise _fault(where, "the content of a turn is not text", content)


def _trained(turn: Mapping[str, Any], where: str) -> bool | None:
    """What the data says about learning this turn: OpenAI's ``weight`` (0 or 1), or ``train``."""
    value = _first(turn, WEIGHT_KEYS)
    if value is None:
        return None
    if value not in (0, 1):
        raise _fault(where, "the weight of a turn is neither 0 nor 1", value)
    return bool(value)


def _calls(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tool calls as chat templates take them: ``{"type", "function": {"name", "arguments": object}}``."""
    calls = value if isinstance(value, list) else [value]
    out = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise _fault(where, "a tool call does not name a function", call)
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):  # OpenAI writes the arguments as JSON text
            arguments = _json(arguments, where) if arguments.strip() else {}
        made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments or {}}}
        if call.get("id") is not None:
            made = {"id": call["id"], **made}
        out.append(made)
    return tuple(out)


def _json(text: str, where: str) -> Any:
    try:
        return json_reader.parse(text, parse_float=numbers.number)
    except ValueError as error:
        raise _fault(where, f"this is not JSON ({error})", text) from error


def _fault(where: str, message: str, received: Any, allowed: Any = None) -> DataError:
    shape = 'turns such as {"role": "user", "content": "…"} or {"from": "human", "value": "…"}'
    return DataError(
        "data-chat",
        message,
        where=where,
        received="nothing" if received is None else received,
        allowed=sorted(allowed) if allowed else shape,
        fix="mend the row, or take it out of the table",
    )
