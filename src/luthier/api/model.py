"""`Model`, Luthier's own Python interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier import config as config_module
from luthier import console, pipeline
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.run import recorded_inputs

if TYPE_CHECKING:
    from luthier.evaluate.compare import Comparison
    from luthier.tuned import Answered, Tuned

Dataset = Any  # a DataFrame, a dict of columns, a list of rows, or a path


class Model:
    """A language model that learns from a table. Made from a config, or loaded from a run folder with `Model.load`."""

    def __init__(
        self, config: str | Path | Mapping[str, Any], *, trust_remote_code: bool = False, quiet: bool = False
    ) -> None:
        """Read and check ``config``; nothing heavy happens yet. Raises ConfigError with every fault found."""
        self.config: Config = config_module.load(config)
        self.trust_remote_code = trust_remote_code
        self.quiet = quiet
        self.folder: Path | None = None
        self._tuned: Tuned | None = None

    @classmethod
    def load(cls, path: str | Path, *, trust_remote_code: bool = False, quiet: bool = False) -> Model:
        """The model of a run folder. Raises RunError when ``path`` is none, AssetError when its base is not here."""
        with console.sink(quiet=quiet) as sink:
            tuned = pipeline.load(path, trust_remote_code=trust_remote_code, sink=sink)
        return cls.of(tuned, trust_remote_code=trust_remote_code, quiet=quiet)

    @classmethod
    def of(cls, tuned: Tuned, *, trust_remote_code: bool = False, quiet: bool = False) -> Model:
        """The interface to a run that is already loaded."""
        made = cls.__new__(cls)
        made.config, made.trust_remote_code, made.quiet = tuned.config, trust_remote_code, quiet
        made.folder, made._tuned = tuned.folder, tuned
        return made

    def train(
        self,
        dataset: Dataset = None,
        *,
        output: str | Path | None = None,
        encoding: str | None = None,
        config: Config | None = None,
    ) -> pipeline.Trained:
        """Fine-tune on ``dataset`` (default: the config's own) into the run folder ``output``.

        ``config``: takes the place of the model's own for this run.
        """
        known = recorded_inputs(self.config.dataset, self.config.file)
        data = known.dataset if dataset is None else dataset
        if data is None:
            raise ConfigError(
                "config-conflict",
                "no dataset is named",
                where="dataset",
                received="no dataset=, and no `dataset:` in the config",
                allowed="a DataFrame, a dict of columns, a list of dicts, a path, or a hub dataset id",
                fix="pass dataset=, or set `dataset:`",
            )
        self._release()
        with console.sink(quiet=self.quiet) as sink:
            trained = pipeline.train(
                config or self.config,
                data,
                output=output,
                encoding=encoding or (known.encoding if dataset is None else None),
                trust_remote_code=self.trust_remote_code,
                sink=sink,
            )
        self.folder, self._tuned = trained.folder, trained.tuned
        return trained

    def predict(self, dataset: Dataset, *, use_base: bool = False, **generation: Any) -> Answered:
        """An answer for every row; ``generation`` overrides keys of the config's section for this call.

        A row whose prompt cannot be answered holds its error, and the others are answered; a table that cannot be read
        whole, such as one with a ragged line, raises DataError.
        """
        with console.sink(quiet=self.quiet) as sink:
            return self._ready().predict(dataset, use_base=use_base, generation=generation or None, sink=sink)

    def evaluate(self, dataset: Dataset = None, *, rows: int | None = None, shots: int = 3) -> Comparison:
        """Base, base with ``shots`` examples and tuned, compared on held-out rows (default: the run's test split)."""
        with console.sink(quiet=self.quiet) as sink:
            return pipeline.evaluate(self._ready(), dataset, rows=rows, shots=shots, sink=sink)

    @overload
    def generate(self, prompt: str, **generation: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **generation: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **generation: Any) -> str | list[str]:
        """The answer to one prompt, or to each of several. The text is the whole prompt: no template is applied.

        With ``n`` over 1, give prompts as a list: n answers to each come one after the other. Raises DataError for
        prompts that cannot be answered, by their number from 0, and ConfigError for settings, before anything is made.
        """
        if isinstance(prompt, str):
            for name in ("n", "num_return_sequences"):
                if generation.get(name) not in (None, 1):
                    raise ConfigError(
                        "config-conflict", "one prompt given as a text gets one answer", where=name,
                        received=generation[name], allowed="1",
                        fix="give the prompt in a list: generate([prompt], n=…)",
                    )  # fmt: skip
            return self._ready().generate([prompt], {**generation, "n": 1})[0]
        return self._ready().generate(prompt, generation or None)

    def stream(self, prompt: str, **generation: Any) -> Iterator[str]:
        """The answer to one prompt in whole characters, as it grows."""
        return self._ready().stream(prompt, generation or None)

    def stream_several(self, prompt: str, **generation: Any) -> Iterator[tuple[int, str]]:
        """All ``n`` answers to one prompt as they grow: pieces, each with the number of its answer."""
        return self._ready().stream_several(prompt, generation or None)

    def save(self, folder: str | Path) -> Path:
        """Copy what was tuned (adapter, config, lock) to ``folder``, which `Model.load` reads."""
        return self._ready().save(Path(folder))

    def _ready(self) -> Tuned:
        if self._tuned is None:
            with console.sink(quiet=self.quiet) as sink:
                self._tuned = pipeline.untuned(self.config, trust_remote_code=self.trust_remote_code, sink=sink)
        return self._tuned

    def _release(self) -> None:
        """Let go of the weights in memory, so that training again does not hold two models."""
        self._tuned = None
