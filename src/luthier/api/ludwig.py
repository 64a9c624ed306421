"""`LudwigModel`: Ludwig's calling conventions on Luthier's engine.

Signatures and result shapes follow Ludwig 0.17 (https://ludwig.ai), with ``<output>_response`` a list of one string
a row, as programs written for its first LLM releases expect. An argument that Luthier cannot honour is refused by
name when it asks for something, never ignored.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import config as config_module
from luthier import console
from luthier.api import arguments, results, sets
from luthier.api.model import Dataset, Model
from luthier.api.results import PreprocessedData, TrainingResults, TrainingStats
from luthier.pipeline.unchanged import require_unchanged
from luthier.run import RunFolder, atomic, numbered, read_metrics
from luthier.run.folder import ADAPTER, WEIGHTS
from luthier.tuned.asking import texts_of
from luthier.tuned.measuring import measures
from luthier.types import SPLITS

if TYPE_CHECKING:
    import pandas as pd

    from luthier.data.table import Table
    from luthier.pipeline import Trained
    from luthier.tuned import Answered


class LudwigModel:
    """Ludwig's interface on Luthier's engine: a config and a DataFrame in, a DataFrame of answers out."""

    def __init__(
        self,
        config: str | Path | Mapping[str, Any],
        logging_level: int = logging.ERROR,
        backend: Any = None,
        gpus: Any = None,
        gpu_memory_limit: Any = None,
        allow_parallel_threads: bool = True,
        callbacks: Sequence[Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read the config. ``logging_level`` at INFO or below shows progress.

        Raises ConfigError for a config that cannot be used, and for ``backend`` (other than local), ``gpus``,
        ``gpu_memory_limit`` and ``callbacks``, which would otherwise be ignored.
        """
        arguments.refuse_machine(backend, gpus, gpu_memory_limit, allow_parallel_threads, callbacks)
        self._model = Model(config, trust_remote_code=trust_remote_code, quiet=logging_level > logging.INFO)

    @property
    def config(self) -> dict[str, Any]:
        """The full config, defaults filled in."""
        return self._model.config.to_dict()

    @property
    def model(self) -> Any:
        """The underlying torch module, once there is one."""
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
        training_set_metadata: Any = None,
        data_format: str | None = None,
        experiment_name: str | None = None,
        model_name: str = "run",
        model_resume_path: str | None = None,
        skip_save_training_description: bool = False,
        skip_save_training_statistics: bool = False,
        skip_save_model: bool = False,
        skip_save_progress: bool = False,
        skip_save_log: bool = False,
        skip_save_processed_input: bool = False,
        output_directory: str = "results",
        random_seed: int | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> TrainingResults:
        """Fine-tune. The run folder is ``<output_directory>/run-N``, the next free N; names given take run's place.

        Without ``dataset`` and ``training_set`` the config's own dataset is taken. ``training_set``, ``validation_set``
        and ``test_set`` are the split, whatever the config says of one. ``model_resume_path`` names the run folder to
        go on with; RunError where there is none. ``random_seed`` overrides the config's in this call. A run folder
        always holds the trained model, its checkpoints and its metrics: asking to leave those out warns. Processed
        input is never kept in it.
        """
        arguments.refuse("callbacks", callbacks or None, "read metrics.jsonl in the run folder, or set trainer.track")
        arguments.refuse("training_set_metadata", training_set_metadata, "leave it out; it is made from the data")
        given = sets.named(training_set, validation_set, test_set)
        sets.check_alone(dataset, given)
        for one in (dataset, *given.values()):
            arguments.check_format(data_format, one)
        arguments.warn_kept(
            skip_save_training_description=skip_save_training_description,
            skip_save_training_statistics=skip_save_training_statistics,
            skip_save_model=skip_save_model,
            skip_save_progress=skip_save_progress,
            skip_save_log=skip_save_log,
        )
        declared = settings = self._model.config
        if random_seed is not None:
            seed = [f"random_seed={random_seed}"]
            settings = config_module.load(declared.to_dict(), seed, file=declared.file)
        if given:
            if unused := sets.unused_split(declared):
                warnings.warn(unused, UserWarning, stacklevel=2)
            dataset, settings = sets.joined(given, settings), sets.fixed(settings)
        name = f"{experiment_name}_{model_name}" if experiment_name else model_name
        output = arguments.resumed(model_resume_path) if model_resume_path else numbered(output_directory, name)
        trained = self._model.train(dataset, output=output, config=settings)
        lines = read_metrics(trained.folder / "metrics.jsonl")
        known = PreprocessedData(trained.tuned.table, trained.tuned.splits, {"examples": dict(trained.rows)})
        stats = TrainingStats.of(trained.output_feature, lines, self._of_test_rows(trained))
        return TrainingResults(stats, known, str(output))  # as Ludwig has it: below output_directory as that was given

    def predict(
        self,
        dataset: Dataset = None,
        data_format: str | None = None,
        split: str = "full",
        batch_size: int | None = None,
        generation_config: Mapping[str, Any] | None = None,
        skip_save_unprocessed_output: bool = True,
        skip_save_predictions: bool = True,
        output_directory: str = "results",
        return_type: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> tuple[pd.DataFrame, str]:
        """Answer every row (of ``split``, when it is not "full"). Returns the predictions and the directory.

        ``skip_save_predictions=False`` writes predictions.parquet into ``output_directory``. Without ``dataset`` the
        table is the one that was trained on.
        """
        arguments.check_asking(data_format, dataset, skip_save_unprocessed_output, return_type, callbacks)
        answered, _ = self._answered(dataset, split, batch_size, generation_config)
        if not skip_save_predictions:
            answered.write(Path(output_directory) / "predictions.parquet")
        return answered.ludwig_frame(), output_directory

    def evaluate(
        self,
        dataset: Dataset = None,
        data_format: str | None = None,
        split: str = "full",
        batch_size: int | None = None,
        skip_save_unprocessed_output: bool = True,
        skip_save_predictions: bool = True,
        skip_save_eval_stats: bool = True,
        collect_predictions: bool = True,
        collect_overall_stats: bool = False,
        output_directory: str = "results",
        return_type: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> tuple[dict[str, dict[str, Any]], pd.DataFrame, str]:
        """Metrics of the tuned model's answers to ``dataset``, the predictions, and the directory.

        The metrics of an output are the loss, perplexity and token accuracy of the answers that the rows hold, and
        those of the answers that the model gives; ``combined`` holds the loss. ``collect_overall_stats`` adds the
        confusion matrix of a category and what is counted from it; of text there is none, as in Ludwig.
        ``skip_save_eval_stats=False`` writes test_statistics.json into ``output_directory``;
        ``collect_predictions=False`` returns an empty frame.
        """
        arguments.check_asking(data_format, dataset, skip_save_unprocessed_output, return_type, callbacks)
        answered, table = self._answered(dataset, split, batch_size, None)
        scores = answered.scores()
        with console.sink(quiet=self._model.quiet) as sink:
            measured = measures(self._model._ready(), table, answered.rows, sink)
        stats = results.evaluation(answered, {**measured, **scores}, overall=collect_overall_stats)
        folder = Path(output_directory)
        if not skip_save_eval_stats:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / "test_statistics.json", stats)
        if not skip_save_predictions:
            answered.write(folder / "predictions.parquet")
        frame = answered.ludwig_frame()
        return stats, frame if collect_predictions else frame.iloc[:0, :0], output_directory

    def experiment(
        self,
        dataset: Dataset = None,
        training_set: Dataset = None,
        validation_set: Dataset = None,
        test_set: Dataset = None,
        training_set_metadata: Any = None,
        data_format: str | None = None,
        experiment_name: str | None = None,
        model_name: str = "run",
        model_resume_path: str | None = None,
        eval_split: str = "test",
        skip_save_training_description: bool = False,
        skip_save_training_statistics: bool = False,
        skip_save_model: bool = False,
        skip_save_progress: bool = False,
        skip_save_log: bool = False,
        skip_save_processed_input: bool = False,
        skip_save_unprocessed_output: bool = True,
        skip_save_predictions: bool = False,
        skip_save_eval_stats: bool = False,
        skip_collect_predictions: bool = False,
        skip_collect_overall_stats: bool = False,
        output_directory: str = "results",
        random_seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Train, then evaluate on ``eval_split``. Returns (evaluation, train stats, preprocessed data, directory).

        Arguments are those of `train` (``kwargs`` too) and `evaluate`. Predictions and statistics are written into the
        run folder; the evaluation is None where the split has no rows. Raises ConfigError, before anything is trained,
        for an ``eval_split`` that there is not.
        """
        arguments.check_split(eval_split)
        arguments.check_asking(None, None, skip_save_unprocessed_output, None, None)
        results = self.train(
            dataset,
            training_set,
            validation_set,
            test_set,
            training_set_metadata=training_set_metadata,
            data_format=data_format,
            experiment_name=experiment_name,
            model_name=model_name,
            model_resume_path=model_resume_path,
            skip_save_training_description=skip_save_training_description,
            skip_save_training_statistics=skip_save_training_statistics,
            skip_save_model=skip_save_model,
            skip_save_progress=skip_save_progress,
            skip_save_log=skip_save_log,
            skip_save_processed_input=skip_save_processed_input,
            output_directory=output_directory,
            random_seed=random_seed,
            **kwargs,
        )
        counted = results.preprocessed_data.training_set_metadata["examples"]
        stats = None
        if eval_split == "full" or counted[{"training": "train"}.get(eval_split, eval_split)]:
            stats, _, _ = self.evaluate(
                split=eval_split,
                skip_save_predictions=skip_save_predictions,
                skip_save_eval_stats=skip_save_eval_stats,
                collect_predictions=not skip_collect_predictions,
                collect_overall_stats=not skip_collect_overall_stats,
                output_directory=results.output_directory,
            )
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
        texts = [input_strings] if isinstance(input_strings, str) else texts_of(input_strings)
        answers = ["".join(console.echo(self._model.stream(text, **options))) for text in texts]
        return answers[0] if isinstance(input_strings, str) else answers

    def save(self, save_path: str) -> None:
        """Write what was tuned to ``save_path``."""
        self._model.save(save_path)

    @classmethod
    def load(
        cls,
        model_dir: str,
        logging_level: int = logging.ERROR,
        backend: Any = None,
        gpus: Any = None,
        gpu_memory_limit: Any = None,
        allow_parallel_threads: bool = True,
        callbacks: Sequence[Any] | None = None,
        from_checkpoint: bool = False,
        trust_remote_code: bool = False,
    ) -> LudwigModel:
        """The model of a run folder (its ``model`` subfolder, in Ludwig's spelling, is understood)."""
        arguments.refuse_machine(backend, gpus, gpu_memory_limit, allow_parallel_threads, callbacks)
        arguments.refuse(
            "from_checkpoint", from_checkpoint or None, "train(model_resume_path=…) goes on from a checkpoint"
        )
        made = cls.__new__(cls)
        made._model = Model.load(model_dir, trust_remote_code=trust_remote_code, quiet=logging_level > logging.INFO)
        return made

    @staticmethod
    def upload_to_hf_hub(
        repo_id: str,
        model_path: str,
        repo_type: str = "model",
        private: bool = False,
        commit_message: str = "Upload a Luthier run",
        commit_description: str | None = None,
    ) -> str:
        """Upload a run's adapter and card to the hub; returns its address. Needs a token in the environment.

        Raises RunError run-damaged where the run's model, or a merged one, is not as it was written.
        The card shows a few held-out rows under "## Samples"; take that section out where they are to stay at home.
        """
        from luthier.export import hub

        arguments.refuse(
            "repo_type", None if repo_type == "model" else repo_type, "a tuned model is a repository of type model"
        )
        path = Path(model_path)
        inside = path.name in ("model", ADAPTER, WEIGHTS) and (path.parent / "run.json").is_file()
        if inside or (path / "run.json").is_file():
            run = RunFolder.load(path)
            require_unchanged(run, lambda event: warnings.warn(getattr(event, "text", ""), UserWarning, stacklevel=2))
            path = run.model_path or path
        return hub.upload(
            path, repo_id, private=private, commit_message=commit_message, commit_description=commit_description
        )

    def _answered(
        self, dataset: Dataset, split: str, batch_size: int | None, generation: Mapping[str, Any] | None
    ) -> tuple[Answered, Table]:
        tuned = self._model._ready()
        with console.sink(quiet=self._model.quiet) as sink:
            table, rows = tuned.asked(dataset, split, sink=sink)
            answered = tuned.answer(
                table, rows, generation=generation, batch_size=batch_size, probabilities=True, sink=sink
            )
        if answered.unasked:  # also where the console is quiet: the frame alone would hide it in empty answers
            warnings.warn(answered.unasked, stacklevel=3)
        return answered, table

    def _of_test_rows(self, trained: Trained) -> dict[str, float]:
        """What Ludwig tells of the test rows, of the model that was kept: they are not looked at while training."""
        tuned, splits = trained.tuned, trained.tuned.splits
        held = [i for i, side in enumerate(splits or ()) if side == SPLITS.index("test")]
        if not held or tuned.table is None or tuned.config.generation.engine == "vllm":  # which tells no loss
            return {}
        with console.sink(quiet=self._model.quiet) as sink:
            return measures(tuned, tuned.table, held, sink)
