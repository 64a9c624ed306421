"""`Models`: several runs over one base, loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import console
from luthier.api.model import Model
from luthier.errors import ConfigError
from luthier.tuned.asking import answers, texts_of
from luthier.types import Request

if TYPE_CHECKING:
    from luthier.pipeline.together import Together


class Models(Mapping[str, Model]):
    """Name → `Model`, one for each run; the base's weights are there once, and prompts of all runs share batches."""

    def __init__(self, together: Together, *, quiet: bool = False) -> None:
        self.together = together
        self._models = {name: Model.of(tuned, quiet=quiet) for name, tuned in together.runs.items()}

    @classmethod
    def load(
        cls,
        runs: Sequence[str | Path] | Mapping[str, str | Path],
        *,
        trust_remote_code: bool = False,
        quiet: bool = False,
    ) -> Models:
        """The models of run folders over one base, called as their folders are or as a mapping of names says.

        Raises RunError, AssetError or ConfigError for runs that are not finished or cannot share a base.
        """
        from luthier.pipeline.together import load_together

        with console.sink(quiet=quiet) as sink:
            return cls(load_together(runs, trust_remote_code=trust_remote_code, sink=sink), quiet=quiet)

    def generate(self, prompts: Sequence[tuple[str | None, str]], **generation: Any) -> list[str]:
        """The answer to each (run, prompt), all in one batch; None asks the base. The text is the whole prompt.

        ``generation`` overrides keys of each run's own section. Raises ConfigError for a run that is not here, and as
        `Model.generate` for texts that cannot be answered.
        """
        runs = self.together.runs
        first = next(iter(runs))
        requests = []
        for at, (name, text) in enumerate(prompts):
            if name is not None and name not in runs:
                raise ConfigError(
                    "config-conflict", "there is no such run here", where="prompts", received=name, allowed=list(runs),
                    fix="name one of these, or None for the base",
                )  # fmt: skip
            tuned, (text,) = runs[name or first], texts_of([text], at)
            sampling = tuned.sampling({**generation, "n": 1})
            requests.append(Request(at, tuned.renderer.text_prompt(text).ids, sampling, adapter=name))
        return [done.text for done in answers(self.together.engine(), requests)]

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)
