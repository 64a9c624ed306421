"""The Python interfaces: `Model`, Luthier's own, and `LudwigModel`, Ludwig's calling conventions unchanged.

    from luthier import Model
    model = Model({"base_model": "smollm2"}); model.train("rows.csv"); model.generate("Hello")

    from luthier.api import LudwigModel
    results = LudwigModel(config="config.yaml").train(dataset=df)

Result shapes of `LudwigModel` follow Ludwig 0.17 (https://ludwig.ai), with ``<output>_response`` a list of one string
a row, as programs written for its first LLM releases expect.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier import config as config_module
from luthier import console, pipeline
from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.run import RunFolder

if TYPE_CHECKING:
    import pandas as pd

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
        made = cls.__new__(cls)
        made.config, made.trust_remote_code, made.quiet = tuned.config, trust_remote_code, quiet
        made.folder, made._tuned = tuned.folder, tuned
        return made

    def train(
        self, dataset: Dataset = None, *, output: str | Path | None = None, encoding: str | None = None
    ) -> pipeline.Trained:
        """Fine-tune on ``dataset`` (default: the config's own) into the run folder ``output``."""
        data = self.config.dataset if dataset is None else dataset
        if data is None:
            raise ConfigError("config-conflict", "no dataset is named", fix="pass dataset=, or set `dataset:`")
        self._release()
        with console.sink(quiet=self.quiet) as sink:
            trained = pipeline.train(
                self.config,
                data,
                output=output,
                encoding=encoding,
                trust_remote_code=self.trust_remote_code,
                sink=sink,
            )
        self.folder, self._tuned = trained.folder, trained.tuned
        return trained

    def predict(self, dataset: Dataset, *, use_base: bool = False, **generation: Any) -> Answered:
        """An answer for every row; ``generation`` overrides keys of the config's section for this call."""
        with console.sink(quiet=self.quiet) as sink:
            return self._ready().predict(dataset, use_base=use_base, generation=generation or None, sink=sink)

    def evaluate(self, dataset: Dataset = None, *, rows: int | None = None, shots: int = 3) -> Comparison:
        """Base, base with ``shots`` examples and tuned, compared on held-out rows (default: the run's test split)."""
        with console.sink(quiet=self.quiet) as sink:
            return self._ready().evaluate(dataset, rows=rows, shots=shots, sink=sink)

    @overload
    def generate(self, prompt: str, **generation: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **generation: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **generation: Any) -> str | list[str]:
        """The answer to one prompt, or to each of several. The text is the whole prompt: no template is applied."""
        answers = self._ready().generate([prompt] if isinstance(prompt, str) else prompt, generation or None)
        return answers[0] if isinstance(prompt, str) else answers

    def stream(self, prompt: str, **generation: Any) -> Iterator[str]:
        """The answer to one prompt in whole characters, as it grows."""
        return self._ready().stream(prompt, generation or None)

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


@dataclass
class TrainingStats:
    """``training[output][metric]`` holds one value an epoch or evaluation, as Ludwig's does; likewise the others."""

    training: dict[str, dict[str, list[float]]]
    validation: dict[str, dict[str, list[float]]]
    test: dict[str, dict[str, list[float]]]


@dataclass
class TrainingResults:
    """What `LudwigModel.train` returns; unpacks as ``train_stats, preprocessed_data, output_directory``."""

    train_stats: TrainingStats
    preprocessed_data: Any
    output_directory: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.train_stats, self.preprocessed_data, self.output_directory))

    def __getitem__(self, index: int) -> Any:
        return (self.train_stats, self.preprocessed_data, self.output_directory)[index]


class LudwigModel:
    """Ludwig's interface on Luthier's engine: a config and a DataFrame in, a DataFrame of answers out."""

    def __init__(
        self,
        config: str | Path | Mapping[str, Any],
        logging_level: int = logging.ERROR,
        backend: Any = None,
        gpus: Any = None,
        callbacks: Sequence[Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read the config. ``logging_level`` at INFO or below shows progress.

        Raises ConfigError for a config that cannot be used, and for ``backend``, ``gpus`` and ``callbacks``,
        which would otherwise be ignored.
        """
        refused = {"backend": backend, "gpus": gpus, "callbacks": callbacks or None}
        for name, value in refused.items():
            if value is not None and value != "local":
                raise ConfigError(
                    "config-not-implemented",
                    f"LudwigModel({name}=…) is not supported",
                    received=value,
                    fix=f"leave {name} out; the planner chooses the device",
                )
        self._model = Model(config, trust_remote_code=trust_remote_code, quiet=logging_level > logging.INFO)

    @property
    def config(self) -> dict[str, Any]:
        """The full config, defaults filled in."""
        return self._model.config.to_dict()

    @property
    def model(self) -> Any:
        """The underlying transformers or PEFT model, once there is one."""
        return self._model._ready().model.module

    def set_logging_level(self, logging_level: int) -> None:
        """Show progress at INFO or below, nothing above."""
        self._model.quiet = logging_level > logging.INFO

    def train(
        self,
        dataset: Dataset = None,
        training_set: Dataset = None,
        validation_set: Dataset = None,
        test_set: Dataset = None,
        output_directory: str = "results",
        experiment_name: str | None = None,
        model_name: str = "run",
        model_resume_path: str | None = None,
        random_seed: int | None = None,
    ) -> TrainingResults:
        """Fine-tune. The run folder is ``<output_directory>/run-N``, the next free N; names given take run's place.

        ``model_resume_path`` names the run folder to go on with. ``random_seed`` overrides the config's.
        """
        if (dataset is None) == (training_set is None):
            raise ConfigError("config-conflict", "give dataset, or training_set with validation_set and test_set")
        data = dataset if dataset is not None else _joined(training_set, validation_set, test_set)
        if random_seed is not None:
            self._model.config = config_module.load(self._model.config.to_dict(), [f"random_seed={random_seed}"])
        name = f"{experiment_name}_{model_name}" if experiment_name else model_name
        output = Path(model_resume_path) if model_resume_path else _next(Path(output_directory), name)
        trained = self._model.train(data, output=output)
        return TrainingResults(self._stats(trained), trained.rows, str(trained.folder))

    def _stats(self, trained: pipeline.Trained) -> TrainingStats:
        name = trained.output_feature

        def of(split: str) -> dict[str, dict[str, list[float]]]:
            return {name: dict(trained.history[split])} if split in trained.history else {}

        return TrainingStats(of("train"), of("validation"), of("test"))

    def predict(
        self,
        dataset: Dataset = None,
        split: str = "full",
        batch_size: int | None = None,
        generation_config: Mapping[str, Any] | None = None,
        output_directory: str = "results",
        skip_save_predictions: bool = True,
    ) -> tuple[pd.DataFrame, str]:
        """Answer every row (of ``split``, when it is not "full"). Returns the predictions and the directory."""
        with console.sink(quiet=self._model.quiet) as sink:
            answered = self._model._ready().predict(
                dataset,
                generation=generation_config,
                split=split,
                batch_size=batch_size,
                probabilities=True,
                sink=sink,
            )
        frame = answered.ludwig_frame()
        if not skip_save_predictions:
            answered.write(Path(output_directory) / "predictions.parquet")
        return frame, output_directory

    def evaluate(
        self, dataset: Dataset = None, split: str = "full", output_directory: str = "results"
    ) -> tuple[dict[str, dict[str, float]], pd.DataFrame, str]:
        """Metrics of the tuned model's answers to ``dataset``, the predictions, and the directory."""
        with console.sink(quiet=self._model.quiet) as sink:
            answered = self._model._ready().predict(dataset, split=split, probabilities=True, sink=sink)
            return {answered.output: answered.scores()}, answered.ludwig_frame(), output_directory

    def experiment(self, dataset: Dataset, **options: Any) -> tuple[Any, ...]:
        """Train, then evaluate on the test rows. Returns (evaluation, train stats, preprocessed data, directory)."""
        results = self.train(dataset=dataset, **options)
        stats, _, _ = self.evaluate(dataset, split="test")
        return stats, results.train_stats, results.preprocessed_data, results.output_directory

    def generate(
        self,
        input_strings: str | list[str],
        generation_config: Mapping[str, Any] | None = None,
        streaming: bool = False,
    ) -> str | list[str]:
        """The answer to each string, which is the whole prompt; ``streaming`` also writes them out as they grow."""
        options = dict(generation_config or {})
        if not streaming:
            return self._model.generate(input_strings, **options)
        texts = [input_strings] if isinstance(input_strings, str) else input_strings
        answers = ["".join(console.echo(self._model.stream(text, **options))) for text in texts]
        return answers[0] if isinstance(input_strings, str) else answers

    def save(self, save_path: str) -> None:
        """Write what was tuned to ``save_path``."""
        self._model.save(save_path)

    @classmethod
    def load(cls, model_dir: str, logging_level: int = logging.ERROR, trust_remote_code: bool = False) -> LudwigModel:
        """The model of a run folder (its ``model`` subfolder, in Ludwig's spelling, is understood)."""
        made = cls.__new__(cls)
        made._model = Model.load(model_dir, trust_remote_code=trust_remote_code, quiet=logging_level > logging.INFO)
        return made

    @staticmethod
    def upload_to_hf_hub(
        repo_id: str, model_path: str, private: bool = False, commit_message: str = "Upload a Luthier run"
    ) -> str:
        """Upload a run's adapter and card to the hub; returns its address. Needs a token in the environment."""
        from luthier.export import hub

        path = Path(model_path)
        if (path / "run.json").is_file():
            path = RunFolder.load(path).model_path or path
        return hub.upload(path, repo_id, private=private, commit_message=commit_message)


def _joined(train: Dataset, validation: Dataset, test: Dataset) -> pd.DataFrame:
    """The given sets as one frame with a `split` column."""
    import pandas as pd

    from luthier.data.sources import read

    frames: list[pd.DataFrame] = []
    for number, part in enumerate((train, validation, test)):
        if part is not None:
            frame = part.copy() if isinstance(part, pd.DataFrame) else read(part).rows.to_pandas()
            frame["split"] = number
            frames.append(frame)
    joined: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return joined


def _next(root: Path, name: str) -> Path:
    """``root/name-N`` with the first N that is free."""
    for number in range(100_000):
        if not (root / f"{name}-{number}").exists():
            return root / f"{name}-{number}"
    raise RunError("run-foreign-files", "100,000 runs are in this folder", where=str(root), fix="choose another folder")
