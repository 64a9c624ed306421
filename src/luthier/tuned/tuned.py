"""`Tuned`: a loaded model with everything it takes to ask it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.config import Config
from luthier.data.columns import holds_chat, reference_of
from luthier.data.layout import Layout
from luthier.data.redact import redact
from luthier.data.render import Renderer
from luthier.data.render.template import RESERVED, fields_of
from luthier.data.sources import Limits, read
from luthier.data.split import split_column
from luthier.data.table import Table, missing_column
from luthier.errors import DataError, RunError
from luthier.evaluate import Comparison
from luthier.infer.grammar import KINDS
from luthier.infer.sampling import idle, resolve
from luthier.metrics.calibration import Calibration, fit
from luthier.run import atomic
from luthier.run.staging import staged
from luthier.tuned.answered import Answered
from luthier.tuned.asking import answers, check, texts_of
from luthier.tuned.choosing import Choices, Scored, chosen, is_choice, scored, searched, told_of_beams
from luthier.tuned.conversation import Conversation
from luthier.tuned.held_out import side_column
from luthier.tuned.reading import Reader, reader_of
from luthier.tuned.trained_on import TrainedOn
from luthier.types import SPLITS, Completion, Engine, Request, Sampling

if TYPE_CHECKING:
    from luthier.assets.tokenizer import Tokenizer
    from luthier.model.tunable import Tunable


SCORED = 256  # answers that are scored together, once all are made: a kill loses so many, and a GPU is kept busy
FITTED = 2000  # validation rows at most: more say no more of one number
CALIBRATION = "calibration.json"  # in a run folder


@dataclass
class Tuned:
    """A loaded model with everything it takes to ask it. Made by the pipeline."""

    config: Config
    tokenizer: Tokenizer
    layout: Layout
    renderer: Renderer
    model: Tunable
    folder: Path | None = None  # absolute
    find_table: Callable[[], TrainedOn] = TrainedOn  # called when it is needed: reading a large one takes a while
    open_base: Callable[[], Tunable] | None = None  # loads the base, where all weights were tuned and hold it no more
    learned: bool = True  # whether it was trained, on answers as the data spells them
    calibration: Calibration | None = None  # of a category output: the temperature of its probabilities
    # sides of the rows of a table that is the training's, told by its content: known even where the file moved
    divided: Callable[[Table], Sequence[int] | None] | None = None
    _base: Tunable | None = None

    @cached_property
    def trained_on(self) -> TrainedOn:
        """The table it was trained on, or why that is not at hand."""
        return self.find_table()

    @property
    def table(self) -> Table | None:
        """The table it was trained on, when that is at hand."""
        return self.trained_on.table

    @property
    def splits(self) -> Sequence[int] | None:
        """0, 1 or 2 for each row of that table."""
        return self.trained_on.splits

    def read(self, dataset: Any, encoding: str | None = None, sink: events.Sink = events.silent) -> Table:
        """Rows to answer or to compare with, read as the config says: its sheet, its limits, what it redacts."""
        given = self.config.preprocessing
        limits = Limits(**given.limits.model_dump())
        table = redact(read(dataset, encoding=encoding, sheet=given.sheet, limits=limits, sink=sink), given.redact)
        if given.redact:
            sink(events.Note(text=table.notes[-1]))
        tools = self.layout.tools if self.layout.kind == "chat" else None
        for column, role in ((self.renderer.system_column, "system prompts"), (tools, "tools")):
            if column is not None and column not in table.columns:
                lacks = f"{table.name} has no column {column!r}"
                sink(events.Warned(text=f"{lacks}: its rows are asked without the {role} of the training"))
        return table

    @property
    def output(self) -> str:
        """The name of the output feature."""
        return self.layout.target or "output"

    def predict(
        self,
        dataset: Any,
        *,
        encoding: str | None = None,
        use_base: bool = False,
        generation: Mapping[str, Any] | None = None,
        split: str = "full",
        batch_size: int | None = None,
        probabilities: bool | None = None,
        sink: events.Sink = events.silent,
    ) -> Answered:
        """Answer the rows of ``dataset``, or of one ``split`` of it when that is not "full".

        A split is what the table's `split` column says or, of the table that was trained on, how it was divided.
        Without ``dataset`` that table is answered.
        ``probabilities``: say how sure the model is of each; None: of a category's answers, where it costs little.
        """
        table, rows = self.asked(dataset, split, encoding=encoding, sink=sink)
        return self.answer(
            table,
            rows,
            use_base=use_base,
            generation=generation,
            batch_size=batch_size,
            probabilities=probabilities,
            sink=sink,
        )

    def asked(
        self, dataset: Any, split: str = "full", *, encoding: str | None = None, sink: events.Sink = events.silent
    ) -> tuple[Table, list[int]]:
        """The table that `predict` answers, and which rows of it."""
        table = self.training_table()[0] if dataset is None else self.read(dataset, encoding, sink)
        return table, list(range(len(table))) if split == "full" else self._rows_of(table, split)

    def answer(
        self,
        table: Table,
        rows: Sequence[int],
        *,
        use_base: bool = False,
        generation: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        prompts: Mapping[int, Sequence[int]] | None = None,
        probabilities: bool | None = None,
        sink: events.Sink = events.silent,
    ) -> Answered:
        """Answer these rows; ``prompts`` replaces the rendered prompt ids of a row (few-shot)."""
        wanted = self.layout.classes is not None if probabilities is None else probabilities
        options = {"use_base": use_base, "generation": generation, "batch_size": batch_size, "prompts": prompts}
        with events.stage(sink, "generate", f"{len(rows)} rows" + (", base model" if use_base else "")):
            each = self.each(table, rows, probabilities=wanted, sink=sink, **options)  # type: ignore[arg-type]
            by_key = {done.key: (done, scores) for done, scores in each}
        ordered = [by_key[index] for index in rows]
        return Answered(
            self.output,
            tuple(rows),
            tuple(done for done, _ in ordered),
            tuple(reference_of(table.row(index), self.layout) for index in rows),
            self.reader,
            tuple(scores for _, scores in ordered) if wanted else None,
            1.0 if use_base else self.temperature,
        )

    def each(
        self,
        table: Table,
        rows: Sequence[int],
        *,
        use_base: bool = False,
        generation: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        prompts: Mapping[int, Sequence[int]] | None = None,
        probabilities: bool = False,
        sink: events.Sink = events.silent,
    ) -> Iterator[Scored]:
        """The answer to each of these rows as it is made, in any order, with its log-probabilities where wanted.

        Where nothing but the likeliest class is asked for, the classes are scored and nothing is generated.
        """
        sampling = self.sampling(generation)
        for line in [*idle(self.config.generation, generation or {}), *told_of_beams(self.reader, sampling)]:
            sink(events.Warned(text=line))
        requests, failed = self.requests_of(table, rows, sampling, prompts)
        yield from ((done, ()) for done in failed)
        if requests:
            row = table.row(requests[0].key)
            yield from self._answers(
                requests, row, use_base=use_base, batch_size=batch_size, probabilities=probabilities, sink=sink
            )

    def reply(
        self,
        row: Mapping[str, Any],
        ids: Sequence[int],
        sampling: Sampling,
        *,
        use_base: bool = False,
        engine: Engine | None = None,
    ) -> Generator[str, None, None]:
        """The answer to the prompt of one row, as it grows; where `predict` answers with a class, that class.

        ``engine``: of `engine`, where answers follow one another.

        Raises ValueError where the prompt cannot be answered.
        """
        if self.reader is None or self.reader.choices is None:
            yield from (engine or self.engine(use_base)).stream(Request(0, ids, sampling))
            return
        for done, _ in self._answers([Request(0, ids, sampling)], row, use_base=use_base):
            if done.finish_reason == "error":
                raise ValueError(done.error)
            yield done.text

    def _answers(
        self,
        requests: Sequence[Request],
        row: Mapping[str, Any],
        *,
        use_base: bool,
        batch_size: int | None = None,
        probabilities: bool = False,
        sink: events.Sink = events.silent,
    ) -> Iterator[Scored]:
        """What `each` gives, of requests that are alike in their settings; ``row`` is that of any of them."""
        reader, sampling = self.reader, requests[0].sampling
        choices = None
        if reader is not None:
            choices = Choices.of(self.renderer, row, reader.choices or reader.classes)
        model, adapter_off = self._model(use_base)
        with model.base_only() if adapter_off else nullcontext():
            if choices is not None and reader is not None and reader.choices is not None:
                sampling = searched(sampling, choices.texts)
                if is_choice(sampling, choices.texts):
                    found = chosen(model, choices, requests)
                    yield from events.progress(sink, "generate", found, total=len(requests), unit="rows")
                    return
                requests = [replace(one, sampling=self._held(sampling, choices, sink)) for one in requests]
        if not probabilities:
            yield from ((done, ()) for done in self.ask(requests, use_base, batch_size, sink))
            return
        for start in range(0, len(requests), SCORED):
            part = requests[start : start + SCORED]
            told = events.part_of(sink, "generate", start, len(requests))
            done = list(self.ask(part, use_base, batch_size, told))
            with model.base_only() if adapter_off else nullcontext():
                yield from scored(model, choices, part, done)

    def _held(self, sampling: Sampling, choices: Choices, sink: events.Sink) -> Sampling:
        """Settings under which an answer is one of the choices, unless they hold it to something else already."""
        if any(sampling.extra.get(kind) is not None for kind in KINDS):
            return sampling
        if find_spec("llguidance") is None:
            told = "answers are drawn from free text: holding draws to the classes needs luthier[constrain]"
            sink(events.Warned(text=told))
            return sampling
        ends = frozenset(self.tokenizer.eos_ids)
        texts = [self.tokenizer.decode([token for token in ids if token not in ends]) for ids in choices.endings]
        return replace(sampling, extra={**sampling.extra, "choices": tuple(texts)})

    def sampling(self, generation: Mapping[str, Any] | None = None) -> Sampling:
        """The config's `generation` section with these keys on top. Raises ConfigError as `infer.sampling.resolve`."""
        return resolve(
            self.config.generation,
            generation,
            seed=self.config.random_seed,
            tokenizer=self.tokenizer,
            vocabulary=self.model.base.spec.vocab,
        )

    def requests_of(
        self, table: Table, rows: Sequence[int], sampling: Sampling, prompts: Mapping[int, Sequence[int]] | None
    ) -> tuple[list[Request], list[Completion]]:
        """What is asked of the engine, and the rows of which no prompt can be made, each with the reason.

        Raises DataError where it is not the row's fault: the table lacks a column.
        """
        self._check_columns(table)
        requests, failed = [], []
        for index in rows:
            try:
                ids = prompts[index] if prompts is not None else self.renderer.prompt(table.row(index), index).ids
            except DataError as error:
                if error.code == "data-missing-column":
                    raise
                failed.append(Completion(index, (), "", "error", error=error.faults[0].message))
            else:
                requests.append(Request(key=index, prompt_ids=ids, sampling=sampling))
        return requests, failed

    def _check_columns(self, table: Table) -> None:
        """Raise DataError for a column that the prompt takes and the table lacks, before any row is rendered."""
        template = self.config.prompt.template
        named = fields_of(template) if template is not None else ()
        whole = template is None or "__sample__" in named  # all inputs, one after another
        inputs = self.layout.inputs if whole else ()
        asked_in_target = self.layout.kind == "chat" or self.renderer.goes_on  # turns, or a text to go on from
        if asked_in_target and not inputs and self.layout.target is not None:
            inputs = (self.layout.target,)
        for name in (*named, *inputs):
            if name not in table.columns and name not in RESERVED:
                raise missing_column(name, table.columns, table.name, otherwise=self.renaming(table, name))

    def renaming(self, table: Table, name: str) -> str:
        """What to do where ``table`` holds conversations under another name than this; nothing where it has none."""
        if self.layout.kind != "chat":
            return ""
        others = [one for one in table.columns if one not in self.layout.inputs and holds_chat(table, one)]
        if not others:
            return ""
        shapes = "role and content, or from and value: both are read"
        return f"rename {others[0]!r}, which holds conversations, to {name!r}, as the training had it ({shapes})"

    @property
    def reader(self) -> Reader | None:
        """What reads the answers of a category output as classes."""
        return reader_of(self.config, self.layout.classes, learned=self.learned)

    @property
    def temperature(self) -> float:
        """What the classes' log-probabilities are divided by, fitted on the validation rows; 1 where none was."""
        return self.calibration.temperature if self.calibration is not None else 1.0

    def evaluate(
        self,
        dataset: Any = None,
        *,
        rows: int | None = None,
        shots: int = 3,
        encoding: str | None = None,
        sink: events.Sink = events.silent,
    ) -> Comparison:
        """Base, base with a few-shot prompt, and tuned on ``dataset`` or else the held-out rows of the training table.

        Of a ``dataset`` that is that table, or has a split column, the held-out rows are taken; else all, with a
        warning where the run was trained on some of them. The comparison is written to ``evaluation.json`` in the run
        folder.
        """
        from luthier.tuned.comparing import evaluate

        return evaluate(self, dataset, rows=rows, shots=shots, encoding=encoding, sink=sink)

    def samples(self, count: int = 3) -> list[dict[str, str]]:
        """A few held-out rows with the base's and the tuned answer, for the report; none without held-out rows."""
        from luthier.tuned.comparing import samples

        return samples(self, count)

    def calibrate(self, rows: Sequence[int], sink: events.Sink = events.silent) -> None:
        """Fit the temperature of a category's probabilities on these rows of the training table, which were held out.

        It is kept in ``calibration.json`` of the run folder. Nothing where no row has a known class.
        """
        if self.reader is None or self.table is None:
            return
        self.calibration = None
        scores, labels = self.answer(self.table, rows[:FITTED], probabilities=True, sink=sink).labelled()
        if not labels:
            return
        self.calibration = fit(scores, labels)
        if self.folder is not None:
            atomic.write_json(self.folder / CALIBRATION, self.calibration.to_json())

    def prompt_of(self, table: Table, index: int) -> str:
        """The prompt of a row as text."""
        return self.renderer.prompt(table.row(index)).text

    def generate(self, prompts: Sequence[str], generation: Mapping[str, Any] | None = None) -> list[str]:
        """The answer to each text, which is the whole prompt; n answers to each, where so many are asked for.

        Raises DataError for texts that cannot be answered, by their number from 0; ConfigError as `sampling`, and where
        a setting leaves no room.
        """
        texts, sampling = texts_of(prompts), self.sampling(generation)
        requests = [Request(i, self.renderer.text_prompt(text).ids, sampling) for i, text in enumerate(texts)]
        return [one.text for done in answers(self.engine(False), requests) for one in (done, *done.others)]

    def stream(self, prompt: str, generation: Mapping[str, Any] | None = None) -> Iterator[str]:
        """The answer to one text in whole characters, as it grows; the first of several. Raises as `generate`."""
        request, engine = self._one(prompt, generation)
        yield from engine.stream(request)

    def stream_several(self, prompt: str, generation: Mapping[str, Any] | None = None) -> Iterator[tuple[int, str]]:
        """All n answers to one text as they grow: pieces, each with the number of its answer. Raises as `generate`."""
        request, engine = self._one(prompt, generation)
        yield from engine.stream_several(request)

    def _one(self, prompt: str, generation: Mapping[str, Any] | None) -> tuple[Request, Engine]:
        """What one text asks for, and whom; it can be answered."""
        (text,) = texts_of([prompt])
        request = Request(0, self.renderer.text_prompt(text).ids, self.sampling(generation))
        engine = self.engine(False)
        check(engine, [request])
        return request, engine

    def chat(self, *, system: str | None = None, sink: events.Sink = events.silent) -> Conversation:
        """A conversation that remembers its turns.

        ``system``: opens it; None: what opens all rows of the training, where they are alike; empty: nothing.
        """
        return Conversation(self, system, sink)

    def save(self, folder: Path) -> Path:
        """Copy what loading needs into ``folder``, whole or not at all. Raises RunError when it holds other files."""
        if self.folder is None:
            raise RunError(
                "run-not-a-run",
                "nothing has been trained yet",
                where=str(folder),
                received="a base as it is",
                allowed="a trained model",
                fix="train before saving",
            )
        if folder.exists() and any(folder.iterdir()):
            raise RunError(
                "run-foreign-files",
                "the folder to save to is not empty",
                where=str(folder),
                received=", ".join(sorted(path.name for path in folder.iterdir())[:5]),
                allowed="a folder that is absent or empty",
                fix="name another folder",
            )
        keep = ("run.json", "config.yaml", "plan.json", "audit.json", "data.json", "README.md", "adapter", "weights")
        with staged(folder) as made:
            for name in (*keep, CALIBRATION):
                part = self.folder / name
                if part.is_dir():
                    shutil.copytree(part, made / name)
                elif part.exists():
                    shutil.copy2(part, made / name)
        return folder

    def ask(
        self, requests: Sequence[Request], use_base: bool, batch_size: int | None, sink: events.Sink
    ) -> Iterator[Completion]:
        """Completions as they are made, in any order."""
        yield from self.engine(use_base, batch_size, sink).generate(requests)

    def engine(self, use_base: bool, batch_size: int | None = None, sink: events.Sink = events.silent) -> Engine:
        """What answers: with what was tuned or with the base. It remembers the last prompt that it streamed for."""
        declared = self.config.trainer.eval_batch_size
        rows = batch_size if batch_size is not None else (declared if isinstance(declared, int) else None)
        model, adapter_off = self._model(use_base)
        return model.engine(self.tokenizer, batch_size=rows, use_base=adapter_off, sink=sink)

    def _model(self, use_base: bool) -> tuple[Tunable, bool]:
        """Who answers, and whether with its adapter off; the base is loaded where the tuned weights replaced it."""
        if not use_base or self.model.has_base or self.open_base is None:
            return self.model, use_base
        if self._base is None:
            self._base = self.open_base()
        return self._base, False

    def release_base(self) -> None:
        """Let go of a base that was loaded to be compared with; it takes as much memory as what was tuned."""
        self._base = None

    def _rows_of(self, table: Table, split: str) -> list[int]:
        """The rows of one split, in Ludwig's names or in ours."""
        name = {"training": "train"}.get(split, split)
        if name not in SPLITS:
            allowed = ["full", "training", *SPLITS[1:]]
            raise DataError(
                "data-split",
                "there is no such split",
                where="split",
                received=split,
                allowed=allowed,
                fix='split="full"',
            )
        numbers = self.splits if table is self.table else self.sides_of(table)
        if numbers is None:
            numbers = split_column(table, side_column(self))
        if numbers is None:
            given = self.config.preprocessing
            part = given.sample_ratio < 1 or given.sample_size is not None
            known = (
                "leave the table out: the run has learned a sample of it" if part else "give the table of the training"
            )
            raise DataError(
                "data-split",
                f"split={split!r} was asked for and the table has no `split` column",
                where=table.name,
                received=table.columns,
                allowed="a table with a `split` column, or that of the training",
                fix=f'ask for split="full", or {known}',
            )
        return [i for i, number in enumerate(numbers) if number == SPLITS.index(name)]

    def sides_of(self, table: Table) -> Sequence[int] | None:
        """0, 1 or 2 for each row, where this is the table that it was trained on, wherever that stands now."""
        if self.divided is not None:
            return self.divided(table)
        same = self.table is not None and table.content_hash == self.table.content_hash
        return self.splits if same else None

    def training_table(self) -> tuple[Table, Sequence[int]]:
        """The table it was trained on, and 0, 1 or 2 for each row. Raises RunError run-no-table."""
        return self.trained_on.required(self.folder, "predict")
