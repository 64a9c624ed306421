"""The composition root: who meets whom, and in which order. The whole flow of a run is on this page.

config + dataset ─ prepare ─▶ Work (base, tokenizer, table, layout, examples, plan)      no weights yet
Work ─ train ─▶ run folder + Tuned          run folder ─ load ─▶ Tuned (see tuned.py)
"""

from __future__ import annotations

import atexit
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import assets, config, events
from luthier.assets.tokenizer import Tokenizer
from luthier.config import Config
from luthier.data import columns, sources, split
from luthier.data.audit import Audit
from luthier.data.columns import Layout
from luthier.data.prepare import Prepared
from luthier.data.prepare import prepare as tokenise
from luthier.data.render import Renderer
from luthier.data.source import TableSource
from luthier.data.table import Table
from luthier.errors import AssetError, ConfigError, Fault, Interrupted
from luthier.plan import machine as machines
from luthier.plan import planner
from luthier.run import Lock, RunFolder, atomic, hash_config, read_metrics, require_space
from luthier.types import Base, Machine, Plan

if TYPE_CHECKING:
    from luthier.tuned import Tuned

# What a run's result may depend on; recorded in its lock.
VERSIONED = ("luthier", "torch", "transformers", "peft", "tokenizers", "bitsandbytes", "numpy")
BYTES_PER_TRAINED_WEIGHT = 4 * 3  # a checkpoint: fp32 weight and two moments


@dataclass(frozen=True)
class Work:
    """Everything that is known before a weight is loaded."""

    config: Config
    base: Base
    tokenizer: Tokenizer
    table: Table
    layout: Layout
    splits: Sequence[int]
    renderer: Renderer
    prepared: Prepared
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


@dataclass(frozen=True)
class Trained:
    """What `train` made."""

    folder: Path
    tuned: Tuned
    output_feature: str
    history: Mapping[str, Mapping[str, list[float]]]  # split -> metric -> one value a step or evaluation
    rows: Mapping[str, int]  # examples of each split

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        last = {name: {m: v[-1] for m, v in of.items() if v} for name, of in self.history.items()}
        return {"run": str(self.folder), "examples": dict(self.rows), "last": last}


def prepare(
    settings: Config,
    dataset: Any,
    *,
    encoding: str | None = None,
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Work:
    """Read, detect, split, render, tokenise, audit and plan. Raises ConfigError, DataError or AssetError."""
    _refuse_unbuilt(settings)
    given = settings.preprocessing
    table = sources.read(dataset, encoding=encoding or given.encoding, sheet=given.sheet, sink=sink)
    declared = settings.output_features[0] if settings.output_features else None
    layout = columns.detect(
        table,
        inputs=[f.name for f in settings.input_features] if settings.input_features else None,
        target=declared.name if declared else None,
        category=declared.type == "category" if declared and "type" in declared.model_fields_set else None,
        exclude=[name for name in (given.split.group, given.split.column) if name is not None],
    )
    settings = config.with_features(
        settings, layout.inputs, layout.target or "output", "category" if layout.classes else "text"
    )
    base = assets.resolve(settings.base_model, trust_remote_code=trust_remote_code, sink=sink)
    tokenizer = Tokenizer.load(base.path)
    divided = _divide(settings, table, layout)
    splits = divided.rows
    for line in (*table.notes, *layout.explanation, *divided.notes):
        sink(events.Note(text=line))
    renderer = _renderer(settings, layout, tokenizer, base, table.columns, table.name)
    prepared = tokenise(table, splits, renderer, sink=sink)
    machine = machines.probe()
    plan = planner.make_plan(settings, base.spec, prepared.stats, machine)
    return Work(settings, base, tokenizer, table, layout, splits, renderer, prepared, machine, plan)


def check(settings: Config, dataset: Any, *, encoding: str | None = None, sink: events.Sink = events.silent) -> Work:
    """What will be learned, without weights."""
    return prepare(settings, dataset, encoding=encoding, sink=sink)


def train(
    settings: Config,
    dataset: Any,
    *,
    output: str | Path | None = None,
    encoding: str | None = None,
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Trained:
    """One config and one table become a tuned model in a run folder, which is continued if it is this run's already."""
    from luthier.train.precision import resolve_precision

    if settings.trainer.type == "none":
        raise ConfigError(
            "config-conflict",
            "`trainer.type: none` says that nothing is trained",
            where="trainer.type",
            received="none",
            allowed="finetune",
            fix="set `type: finetune`, or ask the base as it is: Model(config).predict(dataset)",
        )
    folder = RunFolder.open(output, name=settings.name or _name_of(dataset))
    sink = events.fan_out(sink, folder.metrics)
    try:
        work = prepare(settings, dataset, encoding=encoding, trust_remote_code=trust_remote_code, sink=sink)
        precision = resolve_precision(_declared_precision(work.config), work.machine)
        standing = folder.complete_lock(_lock(work, precision))
        if standing == "finished":
            sink(events.Note(text=f"{folder.path} is finished: nothing to do"))
            folder.close()
            tuned = load(folder.path, trust_remote_code=trust_remote_code, sink=sink)
            return _trained(folder, tuned, work)
        _write_inputs(folder, work, dataset, encoding)
        for one in work.config.filled():
            shown = f"{one.key} = {one.value}" + (f" (Ludwig: {one.ludwig})" if one.ludwig != one.value else "")
            sink(events.Note(text=f"filled in: {shown}"))
        for line in work.audit.lines():
            sink(events.Note(text=line))
        sink(events.Planned(plan=asdict(work.plan)))
        tuned = _fit(work, folder, precision, sink)
        _report(folder, tuned, work)
        folder.finish()
    except BaseException as error:
        if folder.state != "finished":
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
            folder.mark("interrupted" if stopped else "failed")
        folder.close()
        raise
    return _trained(folder, tuned, work)


def load(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Tuned:
    """The model of a finished run. ``overrides`` change its config for this use (generation keys, eval_batch_size).

    Raises RunError when ``path`` is no finished run, AssetError when its base is not here or has another content.
    """
    from luthier.model import adapters
    from luthier.train.precision import resolve_precision

    folder = RunFolder.load(path)
    settings = config.load(folder.path / "config.yaml", overrides)
    lock = folder.lock
    assert lock is not None, "a run with a model has a lock"
    known = folder.read_json("data.json")
    layout = Layout(**{k: tuple(v) if isinstance(v, list) else v for k, v in known["layout"].items()})
    base = assets.resolve(settings.base_model, trust_remote_code=trust_remote_code, sink=sink)
    _same_base(base, lock, folder)
    machine = machines.probe()
    precision = resolve_precision(_declared_precision(settings), machine)
    device = planner.device_of(machine)
    if folder.weights.is_dir():
        model = _base_model(settings, replace(base, path=folder.weights), precision, device, sink)
    else:
        model = _base_model(settings, base, precision, device, sink)
        model = adapters.load_adapter(model, folder.adapter, expect_base_hash=base.content_hash)
    table, splits = _training_data(settings, known, layout, lock, sink)
    return _tuned(settings, base, layout, model, folder.path, precision, device, table, splits, known["columns"])


def untuned(settings: Config, *, trust_remote_code: bool = False, sink: events.Sink = events.silent) -> Tuned:
    """The base model of a config, without training: what `trainer.type: none` predicts with."""
    from luthier.train.precision import resolve_precision

    base = assets.resolve(settings.base_model, trust_remote_code=trust_remote_code, sink=sink)
    machine = machines.probe()
    precision = resolve_precision(_declared_precision(settings), machine)
    device = planner.device_of(machine)
    inputs = tuple(f.name for f in settings.input_features or ())
    target = settings.output_features[0].name if settings.output_features else None
    layout = Layout("columns" if inputs else "text", inputs, target)
    model = _base_model(settings, base, precision, device, sink)
    return _tuned(settings, base, layout, model, None, precision, device, None, None, None)


# ---------------------------------------------------------------------------------------------- the parts


def _fit(work: Work, folder: RunFolder, precision: str, sink: events.Sink) -> Tuned:
    """Load, adapt, train, save."""
    from luthier.model import adapters
    from luthier.model.generic import GenericModel
    from luthier.objectives.sft import Sft
    from luthier.train.evaluation import Evaluator
    from luthier.train.loop import fit
    from luthier.train.setup import Setup

    settings, plan = work.config, work.plan
    model = _base_model(settings, work.base, precision, plan.device, sink)
    if settings.adapter is not None:
        model = adapters.add_adapter(model, settings.adapter, seed=settings.random_seed)
    else:
        model.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    require_space(folder.path, trained * BYTES_PER_TRAINED_WEIGHT * (settings.trainer.keep_last + 2))
    generic = GenericModel(
        model,
        checkpointing=plan.checkpointing,
        neftune_alpha=settings.model_parameters.neftune_noise_alpha,
        seed=settings.random_seed,
    )
    examples = work.prepared.examples
    tuned = _tuned(
        settings, work.base, work.layout, model, folder.path, precision, plan.device, work.table, work.splits,
        work.table.columns,
    )  # fmt: skip
    shown = work.prepared.rows["validation"][: settings.trainer.eval_generation_rows]
    evaluator = Evaluator(
        model=model,
        score=generic.score,
        examples=examples["validation"],
        plan=plan,
        precision=precision,
        max_rows=settings.trainer.max_eval_rows,
        generated=partial(_generated_scores, tuned, shown) if shown and work.layout.target is not None else None,
        sink=sink,
    )
    source = TableSource(
        examples["train"],
        settings.effective_batch,
        settings.random_seed,
        work.prepared.stats.data_hash,
        shuffle=settings.trainer.should_shuffle,
    )
    setup = Setup(
        model=model,
        logprobs=generic.logprobs,
        objective=Sft(settings.trainer.loss_normalization),
        source=source,
        plan=plan,
        trainer=settings.trainer,
        learning_rate=settings.trainer.optimizer.lr or settings.trainer.learning_rate,
        checkpoints=folder.checkpoints,
        evaluate=evaluator if examples["validation"] else None,
        save_adapter=partial(_save_model, model, work, folder),
        precision=precision,
        seed=settings.random_seed,
        sink=events.fan_out(sink, *_trackers(settings, folder)),
        loraplus_lr_ratio=getattr(settings.adapter, "loraplus_lr_ratio", None),
        resume_hint=f"luthier train {folder.path / 'config.yaml'} --output {folder.path}",
    )
    model.train()
    with events.stage(sink, "train", f"{setup.steps} steps, {trained:,} of the weights, {precision}"):
        outcome = fit(setup)
    atomic.write_json(folder.path / "outcome.json", outcome.to_json())
    model.eval()
    return tuned


def _trackers(settings: Config, folder: RunFolder) -> list[Any]:
    """The trackers that the config names, as sinks; each ends with the process."""
    from luthier.train.trackers import open_tracker

    opened = [open_tracker(name, folder.path, folder.path.name, settings.to_dict()) for name in settings.trainer.track]
    for tracker in opened:
        atexit.register(tracker.close)
    return opened


def _generated_scores(tuned: Tuned, rows: Sequence[int]) -> Mapping[str, float]:
    """Metrics of answers generated for a few validation rows."""
    assert tuned.table is not None
    return tuned.answer(tuned.table, rows).scores()


def _declared_precision(settings: Config) -> str:
    """Ludwig's `use_mixed_precision: false` is fp32; true and absent leave it to `precision`."""
    return "fp32" if settings.trainer.use_mixed_precision is False else settings.trainer.precision


def _refuse_unbuilt(settings: Config) -> None:
    """Keys that the schema knows and no code acts on yet are refused, never ignored."""
    output = settings.output_features[0] if settings.output_features else None
    adapter = settings.adapter
    unbuilt = {
        "preprocessing.balance_classes": settings.preprocessing.balance_classes,
        "trainer.compile": settings.trainer.compile,
        "trainer.validation_field": settings.trainer.validation_field,
        "output_features.0.preprocessing.fallback_label": getattr(
            getattr(output, "preprocessing", None), "fallback_label", None
        ),
        "trainer.evaluate_training_set": settings.trainer.evaluate_training_set,
        "output_features.0.decoder": getattr(output, "decoder", None),
        "adapter.type": adapter is not None and adapter.type == "adalora",
        "adapter.postprocessor.merge_adapter_into_base_model": adapter is not None
        and adapter.postprocessor.merge_adapter_into_base_model,
    }
    faults = [
        Fault("config-not-implemented", f"`{key}` is not there yet in this use", key, value, fix="leave it out")
        for key, value in unbuilt.items()
        if value
    ]
    if faults:
        raise ConfigError(faults)


def _base_model(settings: Config, base: Base, precision: str, device: str, sink: events.Sink) -> Any:
    import torch

    from luthier.model.load import load_base

    # Weights that are trained stay in fp32 and are computed with under autocast; frozen ones are held as they are used.
    frozen = settings.adapter is not None or settings.trainer.type == "none"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return load_base(
        base,
        quantization=settings.quantization,
        dtype=kinds.get(precision, torch.float32) if frozen else torch.float32,
        device=device,
        model_parameters=settings.model_parameters,
        sink=sink,
    )


def _save_model(model: Any, work: Work, folder: RunFolder) -> Path:
    """The adapter in PEFT's format, or the whole model where all of it was trained."""
    from luthier.model import adapters

    if work.config.adapter is not None:
        adapters.save_adapter(model, folder.adapter, work.base)
        return folder.adapter
    adapters.save_weights(model, folder.weights, work.base)
    return folder.weights


def _tuned(
    settings: Config,
    base: Base,
    layout: Layout,
    model: Any,
    folder: Path | None,
    precision: Any,
    device: str,
    table: Table | None,
    splits: Sequence[int] | None,
    columns_known: Sequence[str] | None,
) -> Tuned:
    from luthier.train.precision import autocast
    from luthier.tuned import Tuned

    tokenizer = Tokenizer.load(base.path)
    renderer = _renderer(settings, layout, tokenizer, base, columns_known, "data")
    model.eval()
    return Tuned(
        config=settings,
        base=base,
        tokenizer=tokenizer,
        layout=layout,
        renderer=renderer,
        model=model,
        folder=folder,
        autocast=partial(autocast, precision, device),
        table=table,
        splits=splits,
    )


def _renderer(
    settings: Config, layout: Layout, tokenizer: Tokenizer, base: Base, known: Sequence[str] | None, name: str
) -> Renderer:
    return Renderer(
        layout,
        settings.prompt,
        tokenizer,
        preprocessing=settings.preprocessing,
        columns=known,
        limit=base.spec.context,
        name=name,
    )


def _divide(settings: Config, table: Table, layout: Layout) -> split.SplitResult:
    declared = settings.preprocessing.split
    seed = settings.random_seed if declared.seed is None else declared.seed
    target = layout.target if layout.classes else None
    return split.assign(
        table,
        declared,
        seed=seed,
        target=target,
        columns=layout.inputs or None,
        near_duplicates=settings.preprocessing.near_duplicates,
    )


def _training_data(
    settings: Config, known: Mapping[str, Any], layout: Layout, lock: Lock, sink: events.Sink
) -> tuple[Table | None, Sequence[int] | None]:
    """The table a run was trained on and its split, if it is still there unchanged."""
    path = known["dataset"]
    if path is None or not Path(path).exists():
        return None, None
    table = sources.read(path, encoding=known["encoding"], sheet=settings.preprocessing.sheet, sink=sink)
    if table.content_hash != lock.data_hash:
        return None, None
    return table, _divide(settings, table, layout).rows


def _same_base(base: Base, lock: Lock, folder: RunFolder) -> None:
    if base.content_hash != lock.base_hash:
        raise AssetError(
            "asset-wrong-base",
            f"{base.name} is not the base model that this run was trained on",
            where=str(folder.path),
            received=f"{base.content_hash[:16]}… from {base.source}",
            allowed=f"{lock.base_hash[:16]}…",
            fix="put the original base model where it was, or train again",
        )


def _write_inputs(folder: RunFolder, work: Work, dataset: Any, encoding: str | None) -> None:
    folder.write_config(config.dump_yaml(work.config))
    folder.write_plan(asdict(work.plan))
    folder.write_audit(work.audit.to_json())
    path = str(Path(dataset).resolve()) if isinstance(dataset, (str, Path)) and Path(dataset).exists() else None
    known = {
        "dataset": path,
        "encoding": encoding or work.config.preprocessing.encoding,
        "columns": work.table.columns,
        "layout": asdict(work.layout),
    }
    atomic.write_json(folder.path / "data.json", known)


def _lock(work: Work, precision: str) -> Lock:
    """What the run is made from. Versions, machine and plan are recorded; they do not make it another run."""
    versions = {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()}
    resolved = work.config.to_dict()
    resolved["trainer"]["precision"] = precision  # part of the math: resolved once, here
    return Lock(
        config_hash=hash_config(resolved),
        config=resolved,
        data_hash=work.table.content_hash,
        base_hash=work.base.content_hash,
        base_name=work.base.name,
        tokenizer_hash=work.tokenizer.content_hash,
        template_hash=work.renderer.template_hash,
        seed=work.config.random_seed,
        versions=versions,
        machine=asdict(work.machine),
        plan=asdict(work.plan),
        defaults=work.config.defaults,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _report(folder: RunFolder, tuned: Tuned, work: Work) -> None:
    """report.html and the model card, with a few answers of before and after."""
    from luthier.evaluate.report import write_report

    write_report(
        folder.path,
        config=work.config.to_dict(),
        audit=work.audit.to_json(),
        metrics_lines=read_metrics(folder.metrics_path),
        samples=tuned.samples(),
        machine=work.machine,
        versions={name: _version(name) for name in VERSIONED},
    )


def _trained(folder: RunFolder, tuned: Tuned, work: Work) -> Trained:
    history: dict[str, dict[str, list[float]]] = {}
    for line in read_metrics(folder.metrics_path):
        of = history.setdefault(line["split"], {})
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("time", "step", "epoch"):
                of.setdefault(name, []).append(value)
    rows = {name: len(found) for name, found in work.prepared.examples.items()}
    return Trained(folder.path, tuned, tuned.output, history, rows)


def _name_of(dataset: Any) -> str:
    return Path(dataset).stem if isinstance(dataset, (str, Path)) else "run"
