"""Texts that are asked one by one, with nobody to read an error beside the answers: one that has none raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.errors import ConfigError, DataError
from luthier.types import Completion, Engine, Request


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
