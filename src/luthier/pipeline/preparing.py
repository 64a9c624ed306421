"""Everything that is known before a weight is loaded: read, detect, split, render, tokenise, audit, plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from luthier import assets, config, events
from luthier.assets.cache import writable_cache
from luthier.assets.spec import read_json
from luthier.assets.tokenizer import Tokenizer
from luthier.config import Config
from luthier.data import columns, split
from luthier.data.audit import Audit
from luthier.data.layout import Layout
from luthier.data.prepare import Prepared
from luthier.data.prepare import prepare as tokenise
from luthier.data.render import Renderer
from luthier.data.render.template import fields_of, plain_text
from luthier.data.source import TableSource
from luthier.data.table import Table
from luthier.errors import ConfigError, Fault
from luthier.infer.sampling import idle, resolve
from luthier.parallel import place
from luthier.pipeline.continuing import with_adapter_of
from luthier.pipeline.located import base_name
from luthier.pipeline.named import check_butterflies, check_layers, check_metrics, check_trackers
from luthier.pipeline.reading import layout_of, read_table
from luthier.plan import machine as machines
from luthier.plan import make_plan, planner
from luthier.plan.support import BUILT, refusal_of
from luthier.train.schedule import cut_warmup
from luthier.tuned.choosing import told_of_beams
from luthier.tuned.reading import reader_of
from luthier.types import Base, DataStats, Machine, Plan


@dataclass(frozen=True)
class Examined:
    """A config beside its data: what is what in the table, and its rows as tokens. Knows nothing of a machine."""

    config: Config
    base: Base
    tokenizer: Tokenizer
    table: Table
    layout: Layout
    splits: Sequence[int]
    renderer: Renderer
    prepared: Prepared

    def source(self) -> TableSource:
        """The training examples by steps, their classes drawn equally often where that is asked for."""
        settings, examples = self.config, self.prepared.examples["train"]
        classes = None
        if settings.preprocessing.balance_classes:
            rows = (self.table.row(example.row) for example in examples)
            classes = [columns.reference_of(row, self.layout) or "" for row in rows]
        return TableSource(
            examples,
            settings.effective_batch,
            settings.random_seed,
            self.prepared.stats.data_hash,
            shuffle=settings.trainer.should_shuffle,
            classes=classes,
            micro_batch=settings.trainer.micro_batch if settings.trainer.loss_normalization == "micro_batch" else None,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        trainer = self.config.trainer
        return trainer.train_steps or trainer.epochs * self.source().steps_per_epoch

    @property
    def stats(self) -> DataStats:
        """What a plan needs to know of an epoch; of one with balanced classes, the rows that come round again too."""
        found = self.prepared.stats
        if not self.config.preprocessing.balance_classes:
            return found
        drawn = [found.lengths[index] for index in self.source().order(0)]
        trained = round(found.supervised_tokens / max(found.tokens, 1) * sum(drawn))
        return replace(found, lengths=drawn, supervised_tokens=trained)


@dataclass(frozen=True)
class Work(Examined):
    """Everything that is known before a weight is loaded."""

    machine: Machine
    plan: Plan

    @property
    def audit(self) -> Audit:
        """What was counted while rendering."""
        return self.prepared.audit

    def lines(self) -> list[str]:
        """What was found, for people."""
        return self.audit.lines()

    def samples(self, count: int) -> Sequence[Sequence[tuple[str, bool]]]:
        """Rendered rows as pieces of text, each trained or not."""
        return self.audit.samples[:count]

    def to_json(self) -> dict[str, Any]:
        """What was found, as JSON types."""
        return {"layout": asdict(self.layout), "audit": self.audit.to_json(), "plan": asdict(self.plan)}


def prepare(
    settings: Config,
    dataset: Any,
    *,
    encoding: str | None = None,
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Work:
    """Read, detect, split, render, tokenise, audit and plan. Raises ConfigError, DataError or AssetError."""

    def base_of(name: str) -> Base:
        return assets.resolve(located, trust_remote_code=trust_remote_code, sink=sink)

    located = base_name(settings)  # before the table, which may be large, is read
    seen = examine(settings, dataset, base_of, encoding=encoding, sink=sink)
    machine = place().share_of(machines.probe(settings.execution.device))
    engine = replace(BUILT, refusal=refusal_of(read_json(seen.base.path / "config.json")))
    check_layers(seen.config, seen.base, engine)
    check_butterflies(seen.config, planner.device_of(machine, seen.config.execution.device))
    plan = make_plan(seen.config, seen.base.spec, seen.stats, machine, engine=engine)
    known = {field.name: getattr(seen, field.name) for field in fields(seen)}
    return Work(**known, machine=machine, plan=plan)


def examine(
    settings: Config,
    dataset: Any,
    base_of: Callable[[str], Base],
    *,
    encoding: str | None = None,
    sink: events.Sink = events.silent,
) -> Examined:
    """Everything but the machine and the plan. ``base_of``: from the config's base_model to its files.

    Raises ConfigError, DataError, DependencyError (answers under a constraint, without what follows it), and what
    ``base_of`` raises.
    """
    _refuse_unbuilt(settings)
    settings = with_adapter_of(settings)
    table = read_table(settings, dataset, encoding=encoding, sink=sink)
    declared = settings.output_features[0] if settings.output_features else None
    layout = layout_of(settings, table)
    settings = config.with_features(
        settings, layout.inputs, layout.target or "output", "category" if layout.classes else "text"
    )
    if declared is not None and declared.preprocessing.vocab is not None and layout.classes is not None:
        _check_allowed(declared.preprocessing.vocab, layout, table)
        layout = replace(layout, classes=declared.preprocessing.vocab)
    _check_prompt(settings, layout)
    _check_target(settings, layout)
    check_metrics(settings, layout)
    check_trackers(settings)
    base = base_of(settings.base_model)
    tokenizer = Tokenizer.load(base.path)
    # What cannot be generated is told now, before training, which may take long.
    sampling = resolve(settings.generation, tokenizer=tokenizer, vocabulary=base.spec.vocab)
    for line in [*idle(settings.generation), *told_of_beams(reader_of(settings, layout.classes), sampling)]:
        sink(events.Warned(text=line))
    divided = divide(settings, table, layout)
    splits = divided.rows
    for line in (*layout.explanation, *divided.notes):
        sink(events.Note(text=line))
    if alike := columns.spelled_alike(table, layout):
        sink(events.Warned(text=alike))
    if same := columns.one_answer(table, layout, splits):
        sink(events.Warned(text=same))
    if not divided.counts["validation"]:
        without = "no row validates: training cannot tell when it gets worse, and the last step is kept"
        sink(events.Warned(text=f"{without}. Why: {divided.why_none}"))
    renderer = renderer_of(settings, layout, tokenizer, base, table.columns, table.name)
    if settings.prompt.system and not renderer.is_chat:
        raise ConfigError(
            "config-conflict",
            "prompt.system begins a conversation, and the rows are written as plain text",
            where="prompt.system",
            received=settings.prompt.system,
            allowed="prompt.system with a chat template",
            fix="set prompt.chat_template: true, or write the words into prompt.template",
        )
    if told := _told_of_system(settings, renderer):
        sink(events.Warned(text=told))
    if unasked := _unasked(settings, layout):
        named = f"the column {unasked[0]!r} is" if len(unasked) == 1 else f"the columns {', '.join(unasked)} are"
        sink(events.Warned(text=f"{named} an input that prompt.template does not name: the model never sees it"))
    prepared = tokenise(table, splits, renderer, sink=sink, cache=writable_cache())
    seen = Examined(settings, base, tokenizer, table, layout, splits, renderer, prepared)
    if cut := _told_of_warmup(seen):
        sink(events.Warned(text=cut))
    return seen


def check(settings: Config, dataset: Any, *, encoding: str | None = None, sink: events.Sink = events.silent) -> Work:
    """What will be learned, without weights."""
    return prepare(settings, dataset, encoding=encoding, sink=sink)


def renderer_of(
    settings: Config, layout: Layout, tokenizer: Tokenizer, base: Base, known: Sequence[str] | None, name: str
) -> Renderer:
    """The one function from a row to ids, for training and for asking. ``known``: the table's columns, if known."""
    return Renderer(
        layout,
        settings.prompt,
        tokenizer,
        preprocessing=settings.preprocessing,
        columns=known,
        limit=base.spec.context,
        name=name,
    )


def divide(settings: Config, table: Table, layout: Layout) -> split.SplitResult:
    """The split of every row, the same each time it is asked for."""
    declared = settings.preprocessing.split
    seed = settings.random_seed if declared.seed is None else declared.seed
    target = layout.target if layout.classes else None
    return split.assign(
        table,
        declared,
        seed=seed,
        target=target,
        columns=_asked(settings, table, layout) or None,
        near_duplicates=settings.preprocessing.near_duplicates,
        cache=writable_cache(),
    )


def _asked(settings: Config, table: Table, layout: Layout) -> list[str]:
    """The columns that make two rows the same question: the inputs, and what the template writes besides them."""
    written = () if settings.prompt.template is None else fields_of(settings.prompt.template)
    others = [name for name in written if name in table.columns and name != layout.target]
    return list(dict.fromkeys([*layout.inputs, *others])) if layout.inputs else []


def _unasked(settings: Config, layout: Layout) -> list[str]:
    """The inputs that the template leaves out."""
    if settings.prompt.template is None or layout.kind == "chat":
        return []
    written = fields_of(settings.prompt.template)
    return [] if "__sample__" in written else [name for name in layout.inputs if name not in written]


def _told_of_system(settings: Config, renderer: Renderer) -> str | None:
    """What becomes of a column with system prompts that plain text does not name, or that is not alone."""
    column = renderer.layout.system
    if column is None:
        return None
    if not renderer.is_chat:
        if column in fields_of(settings.prompt.template or ""):
            return None
        return (
            f"the column {column!r} is a system prompt that no row is written with: the model never sees it; put "
            f"{{{column}}} into prompt.template, or set prompt.chat_template: true"
        )
    if settings.prompt.system and renderer.system_column is not None:
        return f"prompt.system is written where the column {column!r} is empty; elsewhere the column's text is"
    return None


def _told_of_warmup(seen: Examined) -> str | None:
    """What is told of a warm-up that is longer than the run."""
    trainer = seen.config.trainer
    schedule = trainer.learning_rate_scheduler
    if not (schedule.warmup_steps or schedule.warmup_evaluations):  # a fraction is never over all steps
        return None
    return cut_warmup(schedule, seen.steps, trainer.steps_per_evaluation or seen.source().steps_per_epoch)


def _refuse_unbuilt(settings: Config) -> None:
    """Keys that the schema knows and no code acts on yet are refused, never ignored."""
    features = {
        f"{where}.{at}": feature
        for where in ("input_features", "output_features")
        for at, feature in enumerate(getattr(settings, where) or ())
    }
    renamed = {f"{where}.column": one.column for where, one in features.items() if one.column not in (None, one.name)}
    limited = {f"{where}.preprocessing.max_sequence_length": one.preprocessing.max_sequence_length
               for where, one in features.items()}  # fmt: skip
    unbuilt = [(key, value, "name the feature as the column is named") for key, value in renamed.items()]
    unbuilt += [
        (key, str(value), "set preprocessing.max_sequence_length, which holds for the whole example")
        for key, value in limited.items()
        if value is not None
    ]
    if settings.trainer.compile:  # measured: a minute for two layers on a CPU, minutes for a real model
        unbuilt.append(("trainer.compile", "true", "leave it out: compiling takes longer here than it saves"))
    faults = [Fault("config-not-implemented", f"`{key}` has no effect here", key, value, "nothing", fix)
              for key, value, fix in unbuilt]  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _check_allowed(vocab: Sequence[str], layout: Layout, table: Table) -> None:
    """Rows with an answer beside the allowed ones would train what is never given."""
    assert layout.target is not None and layout.classes is not None, "a target that is a class"
    found = Counter(map(plain_text, table.values(layout.target)))
    stray = [name for name in layout.classes if name not in vocab]
    if stray:
        raise ConfigError(
            "config-conflict",
            f"{sum(found[name] for name in stray)} rows have an answer that the config does not allow",
            where="output_features.0.preprocessing.vocab",
            received=", ".join(stray[:5]),
            allowed=list(vocab),
            fix="add these answers to vocab, or take the rows out of the table",
        )


def _check_prompt(settings: Config, layout: Layout) -> None:
    """Conversations ask with their own turns, and running text asks nothing: no key is in vain."""
    template, task = settings.prompt.template, settings.prompt.task
    if layout.kind == "chat":
        held, named = "conversations", {"prompt.template": template, "prompt.task": task}
    elif layout.kind == "text" and template is None:
        held, named = "running text", {"prompt.task": task}
    else:
        return
    faults = [
        Fault(
            "config-conflict",
            f"the data holds {held}, in which {key} has no place",
            key,
            value,
            f"nothing, where the data holds {held}",
            "leave it out; prompt.system and prompt.chat_template shape conversations",
        )
        for key, value in named.items()
        if value is not None
    ]
    if faults:
        raise ConfigError(faults)


def _check_target(settings: Config, layout: Layout) -> None:
    """What the config says of the target agrees with what the target is."""
    faults = []
    field = settings.trainer.validation_field
    if field is not None and field != (layout.target or "output"):
        faults.append(
            Fault(
                "config-bad-value",
                "there is no output feature of this name whose metric could be watched",
                "trainer.validation_field",
                field,
                [layout.target or "output"],
                "leave it out: there is one output feature",
            )
        )
    if settings.preprocessing.balance_classes and layout.classes is None:
        faults.append(
            Fault(
                "config-conflict",
                "classes cannot be drawn equally often: the target is no class",
                "preprocessing.balance_classes",
                "true, and a target that is no class",
                "a target of few different answers, or of type category",
                "set the output feature's type to category, or leave balance_classes out",
            )
        )
    output = settings.output_features[0] if settings.output_features else None
    known = layout.classes or ()
    decoder = output.decoder if output is not None else None
    named = {"decoder.match": list(decoder.match)} if decoder is not None else {}
    if output is not None and output.fallback_label is not None:
        named["fallback_label"] = [output.fallback_label]
    for key, labels in named.items():
        faults += [
            Fault(
                "config-bad-value",
                f"{label!r} is no class of the target",
                f"output_features.0.{key}",
                label,
                list(known) or "no label: the target has no classes",
                "name a class of the target" if known else "set the output feature's type to category",
            )
            for label in labels
            if label not in known
        ]
    if faults:
        raise ConfigError(faults)
