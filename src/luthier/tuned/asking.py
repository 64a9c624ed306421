"""Texts that are asked one by one, with nobody to read an error beside the answers: one that has none raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.errors import ConfigError, DataError, Fault
from luthier.types import Completion, Engine, Request


def texts_of(prompts: Any, first: int = 0) -> list[str]:
    """The prompts as they are, numbered from ``first``. Raises DataError data-prompt for what is no text."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise DataError("data-prompt", "prompts are a list of texts", **_no_text("prompts", prompts))
    texts = list(prompts)
    if faults := [
        Fault("data-prompt", "a prompt is a text", **_no_text(f"prompt {at}", text))
        for at, text in enumerate(texts, first)
        if not isinstance(text, str)
    ]:
        raise DataError(faults)
    return texts


def _no_text(where: str, received: Any) -> dict[str, Any]:
    shown = "None" if received is None else received
    return {"where": where, "received": shown, "allowed": "a text, or a list of texts",
            "fix": "give the whole prompt as text; rows of a table are for predict"}  # fmt: skip


def check(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise for the requests that cannot be answered, each by its key, before anything is generated.

    Raises DataError data-prompt, or ConfigError where a setting leaves no room.
    """
    faults = []
    for request in requests:
        fault = engine.refusal(request)
        if fault is not None:
            place = f"prompt {request.key}"
            faults.append(replace(fault, where=f"{place}, {fault.where}" if fault.where else place))
    if faults:
        raise (ConfigError if faults[0].code.startswith("config-") else DataError)(faults)


def answers(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """The answer to each request, in their order. Raises as `check`, and DataError for one that memory cannot hold."""
    check(engine, requests)
    by_key: dict[int, Completion] = {}
    for done in engine.generate(requests):
        failed = next((one for one in (done, *done.others) if one.error), None)
        if failed is not None:
            raise DataError(
                "data-prompt",
                str(failed.error),
                where=f"prompt {done.key}",
                received=str(failed.error),
                allowed="a prompt that fits the memory of this machine",
                fix="shorten it, or lower max_new_tokens",
            )
        by_key[done.key] = done
    return [by_key[request.key] for request in requests]
