"""Several answers to one prompt: a request becomes one for each answer, and their completions one again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from luthier.errors import Fault
from luthier.types import Completion, Request

Answers = Callable[[Sequence[Request]], Iterable[Completion]]


def completed(
    requests: Sequence[Request], refusal: Callable[[Request], Fault | None], answers: Answers
) -> Iterator[Completion]:
    """A completion for each request: refused ones at once, with the reason, the others as ``answers`` come."""
    accepted = []
    for request in requests:
        fault = refusal(request)
        if fault:
            yield Completion(request.key, (), "", "error", error=fault.message)
        else:
            accepted.append(request)
    yield from folded(accepted, answers(expanded(accepted)))


def expanded(requests: Sequence[Request]) -> list[Request]:
    """One request for each answer. Beams stay one: a single search finds the several best."""
    return [
        replace(request, number=number) if number else request
        for request in requests
        for number in range(1 if request.sampling.num_beams > 1 else request.sampling.n)
    ]


def folded(requests: Sequence[Request], completions: Iterable[Completion]) -> Iterator[Completion]:
    """One completion for each request, as soon as all of its answers are there, the others within the first."""
    wanted = {request.key: request.sampling.n for request in requests}
    met: dict[int, list[Completion]] = {}
    for done in completions:
        own = met.setdefault(done.key, [])
        own.append(done)
        if len(own) == wanted[done.key]:
            first, *others = sorted(met.pop(done.key), key=lambda one: one.number)
            yield replace(first, others=tuple(others)) if others else first
