"""Several runs over one base, loaded once: their adapters share its weights, and their rows share batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier import assets, events
from luthier.errors import AssetError, ConfigError, Fault
from luthier.model.decoder.adapter import Adapter, read_adapter
from luthier.model.tunable import Tokens
from luthier.pipeline.decoded import Decoded
from luthier.pipeline.loading import Found, find, tuned_of
from luthier.pipeline.opening import decodes, open_base
from luthier.tuned import Tuned
from luthier.types import Batch, Completion, Engine, Request


@dataclass(frozen=True)
class Together:
    """Runs that were loaded together, by name. Each is asked as if it were alone; `engine` mixes them."""

    runs: Mapping[str, Tuned]
    base: Decoded
    adapters: Mapping[str, Adapter]

    def engine(self, *, batch_size: int | None = None, sink: events.Sink = events.silent) -> Engine:
        """One engine for the requests of all. ``Request.adapter`` names the run that answers; None is the base."""
        tokenizer = next(iter(self.runs.values())).tokenizer
        return self.base.engine(tokenizer, batch_size=batch_size, adapters=self.adapters, sink=sink)


def load_together(
    paths: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Together:
    """The models of several finished runs over one base. They are called as their folders are, or as a mapping says.

    Raises RunError when one is no finished run; AssetError when its base is another one (asset-wrong-base), or when
    its adapter cannot share a batch (asset-unsupported); ConfigError when two have one name, or hold the base in
    another precision.
    """
    found = {name: find(path, sink=sink) for name, path in _named(paths).items()}
    first = next(iter(found.values()))
    for one in found.values():
        _same(first, one)
    base = assets.resolve(first.base_name, trust_remote_code=trust_remote_code, sink=sink)
    for one in found.values():
        one.require(base)
        if one.settings.generation.engine not in ("auto", "luthier"):
            raise ConfigError(
                "config-conflict",
                "several runs share a batch in Luthier's own engine alone",
                where=f"generation.engine of {one.folder.path}",
                received=one.settings.generation.engine,
                allowed=("auto", "luthier"),
                fix="set generation.engine: auto in that run's config.yaml, or load it alone",
            )
        if one.settings.adapter is None or not decodes(one.settings, base):
            raise AssetError(
                "asset-unsupported",
                "this run cannot be loaded together with others: only low-rank adapters on Luthier's own decoder can",
                where=str(one.folder.path),
                received=one.settings.adapter.type if one.settings.adapter is not None else "all weights",
                allowed="adapter.type: lora",
                fix="load it alone",
            )
    opened = open_base(first.settings, base, first.precision, first.device, sink)
    assert isinstance(opened, Decoded), "what the decoder runs, it runs"
    adapters = {
        name: read_adapter(opened.decoder, one.settings.adapter, one.folder.adapter, name)
        for name, one in found.items()
    }
    runs = {name: tuned_of(one, base, Beside(opened, adapters[name]), sink) for name, one in found.items()}
    return Together(runs, opened, adapters)


class Beside(Decoded):
    """A `model.tunable.Tunable` for one adapter beside others on the same base. It is asked, never trained."""

    def __init__(self, base: Decoded, adapter: Adapter) -> None:
        super().__init__(base.decoder, base.base, "nothing")
        self._adapter, self._off = adapter, False

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """As `Decoded.logprobs`, with the adapter."""
        with self._using():
            return super().logprobs(batch)

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Decoded.score`, with the adapter."""
        with self._using():
            return super().score(batch)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The adapter is off while it is open."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def engine(self, tokenizer: Tokens, *, use_base: bool = False, **options: Any) -> Engine:
        """Generation with the adapter, or with the base."""
        engine = super().engine(tokenizer, adapters={self._adapter.name: self._adapter}, **options)
        return engine if use_base else _Named(engine, self._adapter.name)

    def _using(self) -> AbstractContextManager[None]:
        return self.decoder.without_adapter() if self._off else self.decoder.using(self._adapter.layers)


class _Named:
    """Implements `types.Engine`: what it is asked, it asks of one adapter."""

    def __init__(self, engine: Engine, adapter: str) -> None:
        self._engine, self._adapter = engine, adapter

    def refusal(self, request: Request) -> Fault | None:
        return self._engine.refusal(replace(request, adapter=self._adapter))

    def generate(self, requests: Any) -> Iterator[Completion]:
        yield from self._engine.generate([replace(one, adapter=self._adapter) for one in requests])

    def stream(self, request: Request) -> Iterator[str]:
        yield from self._engine.stream(replace(request, adapter=self._adapter))

    def stream_several(self, request: Request) -> Iterator[tuple[int, str]]:
        yield from self._engine.stream_several(replace(request, adapter=self._adapter))


def _named(paths: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    named = paths.items() if isinstance(paths, Mapping) else ((Path(path).resolve().name, path) for path in paths)
    pairs = list(named)
    if not pairs:
        raise ConfigError(
            "config-conflict", "no run is named", received="nothing", allowed="run folders", fix="name at least one"
        )
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            "config-conflict",
            "two runs have the same name",
            received=twice,
            allowed="each name once",
            fix="give names of your own: {'first': 'a/run', 'second': 'b/run'}",
        )
    return dict(pairs)


def _same(first: Found, other: Found) -> None:
    """Refuse a run whose base is another one, or is held otherwise."""
    if other.lock.base_hash != first.lock.base_hash:
        raise AssetError(
            "asset-wrong-base",
            "runs that are loaded together have one base, and these were trained on different ones",
            where=str(other.folder.path),
            received=f"{other.lock.base_name}, content {other.lock.base_hash[:16]}…",
            allowed=f"{first.lock.base_name}, content {first.lock.base_hash[:16]}… (that of {first.folder.path})",
            fix="load it alone",
        )
    for what, mine, theirs in (
        ("trainer.precision", first.precision, other.precision),
        ("quantization", first.settings.quantization, other.settings.quantization),
        ("model_parameters.rope_scaling", *(one.settings.model_parameters.rope_scaling for one in (first, other))),
    ):
        if mine != theirs:
            raise ConfigError(
                "config-conflict",
                f"runs that are loaded together hold their base alike, and {what} differs",
                where=f"{other.folder.path / 'config.yaml'}: {what}",
                received=str(theirs),
                allowed=f"{mine} (that of {first.folder.path})",
                fix="load it alone",
            )
