"""One config and one table become a tuned model in a run folder."""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier import config, events
from luthier.assets import file_hashes
from luthier.config import Config
from luthier.errors import ConfigError, Interrupted, LuthierError, TrainingError
from luthier.infer.answer import is_out_of_memory
from luthier.parallel import connect, in_turn, place
from luthier.pipeline.ahead import import_ahead
from luthier.pipeline.changed import inside
from luthier.pipeline.finishing import merge, report, versions
from luthier.pipeline.fitting import fit_and_save
from luthier.pipeline.forking import Origin, origin_of
from luthier.pipeline.loading import load
from luthier.pipeline.located import base_name
from luthier.pipeline.opening import declared_precision
from luthier.pipeline.preparing import Work, prepare
from luthier.plan.recorded import continued
from luthier.run import Lock, RunFolder, atomic, hash_config, not_writable, read_metrics
from luthier.run.folder import Standing
from luthier.run.inputs import RECORD, ROWS
from luthier.run.mirror import ENDED_WAIT, Mirror
from luthier.run.verify import sums_of
from luthier.tuned import Tuned
from luthier.types import Plan

if TYPE_CHECKING:
    from luthier.config.defaults import Filled
    from luthier.data.audit import Audit
    from luthier.train.comm import Comm


@dataclass(frozen=True)
class Trained:
    """What `train` made."""

    folder: Path  # absolute: it is found from another working directory too
    named: Path  # the same as this call was told it, which is what people are shown
    standing: Literal["new", "resumed", "finished"]  # what this call found: "finished" when nothing was left to do
    tuned: Tuned = field(repr=False)
    output_feature: str
    history: Mapping[str, Mapping[str, list[float]]] = field(repr=False)  # split -> metric -> a value each time
    rows: Mapping[str, int]  # examples of each split
    audit: Audit = field(repr=False)
    filled: Sequence[Filled] = field(repr=False)  # where the config given to this call is silent

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        run = RunFolder.load(self.folder)
        last = {name: {m: v[-1] for m, v in of.items() if v} for name, of in self.history.items()}
        return {
            "run": str(self.named),
            "standing": self.standing,
            "state": run.state,
            "report": str(self.named / run.report.name),
            "filled": [{"key": one.key, "value": one.value, "ludwig": one.ludwig} for one in self.filled],
            "examples": dict(self.rows),
            "dropped": {reason: len(rows) for reason, rows in self.audit.dropped.items()},
            "cut": {policy: len(rows) for policy, rows in self.audit.cut.items()},
            "best": _best(run),
            "last": last,
        }


def _best(run: RunFolder) -> dict[str, Any] | None:
    """The evaluation whose weights were kept: its step, and the metric that decided; None where no row validates."""
    outcome = run.read_json("outcome.json")
    step = outcome["best_step"]
    return None if step is None else {"step": step, "metric": outcome["metric"], "value": outcome["best_value"]}


def train(
    settings: Config,
    dataset: Any,
    *,
    output: str | Path | None = None,
    encoding: str | None = None,
    trust_remote_code: bool = False,
    fork: str | Path | None = None,
    mirror: str | None = None,
    sink: events.Sink = events.silent,
) -> Trained:
    """One config and one table become a tuned model in a run folder, which is continued if it is this run's already.

    ``fork``: a run, or one of its checkpoints, whose weights a new run starts from; its optimizer and schedule are new.
    ``mirror``: a folder or an fsspec URL that gets a copy of each checkpoint, and from which a new machine goes on.
    """
    if settings.trainer.type == "none":
        raise ConfigError(
            "config-conflict",
            "`trainer.type: none` says that nothing is trained",
            where="trainer.type",
            received="none",
            allowed="finetune",
            fix="set `type: finetune`, or ask the base as it is: Model(config).predict(dataset)",
        )
    with connect() as comm:
        copies = _mirror(mirror, output, sink) if comm.rank == 0 else None
        folder = _opened(comm, output, settings.name or _name_of(dataset))
        sink = events.fan_out(sink, folder.metrics) if comm.rank == 0 else events.silent
        if copies is not None:
            sink = events.fan_out(sink, copies)
        import_ahead(settings)
        try:
            with in_turn(comm):
                work = prepare(settings, dataset, encoding=encoding, trust_remote_code=trust_remote_code, sink=sink)
            origin, inputs = _origin(folder, fork, sink), _inputs(work, dataset, encoding)
            made = _on_ranks(work, folder, comm, inputs, origin, copies, trust_remote_code, sink)
            comm.barrier()  # rank 0 has finished the folder
        except BaseException as error:
            if comm.rank == 0 and not (_refused(error) and folder.discard()):
                _mark_ended(folder, error)
            if copies is not None and isinstance(error, Exception):
                copies.close(ENDED_WAIT, ended=False)
            if isinstance(error, OSError) and (atomic.is_full(error) or _inside(error.filename, folder.path)):
                raise not_writable(folder.path, error) from error
            if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
                raise _no_memory(folder, error) from error
            if (number := _signal_of(error)) is not None:
                raise _ended_at_once(folder, number) from None
            raise
    return made


def _opened(comm: Comm, output: str | Path | None, name: str) -> RunFolder:
    """The run folder: rank 0 writes to it, the others read."""
    if comm.rank == 0:
        folder = RunFolder.open(output, name=name)
        comm.share(str(folder.path))
        return folder
    return RunFolder.load(comm.share(None), trained=False)


def _on_ranks(
    work: Work,
    folder: RunFolder,
    comm: Comm,
    inputs: Mapping[str, Any],
    origin: Origin | None,
    copies: Mirror | None,
    trust_remote_code: bool,
    sink: events.Sink,
) -> Trained:
    """What every rank does once the data is prepared; rank 0 alone writes and speaks."""
    from luthier.plan.precision import resolve_precision

    first = comm.rank == 0
    precision = resolve_precision(declared_precision(work.config), work.machine)
    standing: Standing = comm.share(_standing(work, folder, precision, origin) if first else None)
    if copies is not None:
        copies.follow(folder)
    if first and standing == "new" and origin is not None:
        folder.mark("training", forked=origin.to_json())
    if standing == "finished":
        sink(events.Note(text=f"{folder.path} is finished: nothing to do"))
        folder.close()
        tuned = load(folder.path, trust_remote_code=trust_remote_code, sink=sink)
        return _trained(folder, standing, tuned, work)
    work, forced = _with_recorded_plan(work, folder) if first and standing == "resume" else (work, "")
    work = _with_plan_of_first(work, comm)
    if first:
        _write_inputs(folder, work, inputs)
    for one in work.config.filled():
        shown = f"{one.key} = {_said(one.value)}"
        shown += f" (Ludwig: {_said(one.ludwig)})" if one.ludwig != one.value else ""
        sink(events.Note(text=f"filled in: {shown}"))
    for line in work.audit.lines():
        sink(events.Note(text=line))
    sink(events.Planned(plan=asdict(work.plan), why=forced))
    tuned = fit_and_save(work, folder, precision, comm, sink, origin)
    if first:
        if work.config.adapter is not None and work.config.adapter.postprocessor.merge_adapter_into_base_model:
            merge(work, folder, sink)
        if work.layout.classes is not None:
            tuned.calibrate(work.prepared.rows["validation"], sink)
        report(folder, tuned, work)
        folder.finish(**sums_of(folder))
    if copies is not None:
        copies.close()
    return _trained(folder, standing, tuned, work)


def _standing(work: Work, folder: RunFolder, precision: str, origin: Origin | None) -> Standing:
    return folder.complete_lock(_lock(work, precision, origin), lambda key: inside(key, folder.path, work))


def _with_plan_of_first(work: Work, comm: Comm) -> Work:
    """The work with rank 0's plan, on this rank's device: free memory may differ, the passes may not."""
    plan = Plan.from_json(comm.share(asdict(work.plan)))
    return replace(work, plan=replace(plan, device=place().device(plan.device)))


def _mark_ended(folder: RunFolder, error: BaseException) -> None:
    """Enter how the run ended and let go of it; on a full disk the folder stays as it is."""
    stopped = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
    with suppress(OSError):
        if folder.state != "finished":
            folder.mark("interrupted" if stopped else "failed")
    folder.close()


def _refused(error: BaseException) -> bool:
    """Whether the run was told to be impossible, rather than ended from outside or by a fault of ours."""
    return isinstance(error, LuthierError) and not isinstance(error, Interrupted)


def _inside(name: Any, folder: Path) -> bool:
    """Whether a file that an error names lies in the run folder."""
    return isinstance(name, str) and Path(name).absolute().is_relative_to(folder.absolute())


def _no_memory(folder: RunFolder, error: BaseException) -> TrainingError:
    """What is said when memory ended where no smaller pass could help: while loading, evaluating, saving."""
    begun = (folder.path / "config.yaml").is_file()
    again = f"luthier train --resume {folder.path}" if begun else f"the same command, with --output {folder.path}"
    return TrainingError(
        "training-no-memory",
        "out of memory; the run's checkpoints are whole",
        where=str(folder.path),
        received=str(error).split("\n")[0] or type(error).__name__,
        fix=f"end other programs, or choose a smaller base (`luthier plan` shows what fits); to go on: {again}",
    )


def _signal_of(error: BaseException) -> int | None:
    """The signal that this stands for: Ctrl-C, or what the command line makes of SIGTERM."""
    if isinstance(error, KeyboardInterrupt):
        return int(signal.SIGINT)
    ended = isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM
    return int(signal.SIGTERM) if ended else None


def _ended_at_once(folder: RunFolder, number: int) -> Interrupted:
    """What is said of a signal that came while no step was under way, or came twice."""
    names = (one.name for one in folder.checkpoints.glob("step-*"))
    newest = max(names, key=lambda name: (len(name), name), default=None)
    since = f"nothing before {newest} is lost" if newest else "there was no checkpoint yet, so it begins anew"
    begun = (folder.path / "config.yaml").is_file()
    again = f"luthier train --resume {folder.path}" if begun else f"the same command, with --output {folder.path}"
    said = f"ended by {signal.Signals(number).name}; {since}"
    return Interrupted(number, said, where=str(folder.path), fix=f"to go on: {again}")


def _mirror(url: str | None, output: str | Path | None, sink: events.Sink) -> Mirror | None:
    """The mirror, after what it holds was put where this machine has no run folder yet."""
    if url is None:
        return None
    if output is None:
        raise ConfigError(
            "config-conflict",
            "a mirror belongs to one run folder, which has to be named so that it is found again",
            where="--mirror",
            received=url,
            fix="add --output DIR",
        )
    copies = Mirror(url, sink)
    copies.restore(Path(output))
    return copies


def _origin(folder: RunFolder, fork: str | Path | None, sink: events.Sink) -> Origin | None:
    """The checkpoint that the run starts from: the one asked for, or the one that it was begun with."""
    recorded = folder.record.get("forked")
    if fork is None:
        return Origin(**recorded) if recorded else None
    return origin_of(fork, sink)


def _said(value: Any) -> str:
    """A config's value as it would be written in the file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _with_recorded_plan(work: Work, folder: RunFolder) -> tuple[Work, str]:
    """The work with the plan that the run goes on with, and why it is not the recorded one ("" when it is)."""
    lock = folder.lock
    if lock is None or not (folder.path / "plan.json").is_file():
        return work, ""
    plan, why = continued(
        Plan.from_json(folder.read_json("plan.json")),
        work.plan,
        config=work.config,
        spec=work.base.spec,
        stats=work.stats,
        machine=work.machine,
        made_on=folder.planned_for("machine", lock.machine),
        pins=folder.planned_for("execution", lock.config.get("execution") or {}),
    )
    if why:
        pins = work.config.execution.model_dump(mode="json")
        folder.append_plan(asdict(plan), why, machine=asdict(work.machine), execution=pins)
    return replace(work, plan=plan), why


def _write_inputs(folder: RunFolder, work: Work, inputs: Mapping[str, Any]) -> None:
    folder.write_config(config.dump_yaml(work.config))
    folder.write_plan(asdict(work.plan))
    folder.write_audit(work.audit.to_json())
    atomic.write_json(folder.path / RECORD, dict(inputs))
    atomic.write_bytes(folder.path / ROWS, work.table.row_hashes)


def _inputs(work: Work, dataset: Any, encoding: str | None) -> dict[str, Any]:
    """What is needed to read the table again as it was read for training."""
    named = str(dataset) if isinstance(dataset, (str, Path)) else None
    if named is not None and Path(named).expanduser().exists():
        named = str(Path(named).expanduser().resolve())  # else the id of a dataset on the hub
    base = Path(base_name(work.config)).expanduser()
    return {
        "dataset": named,
        "base": str(base.resolve()) if base.exists() else None,
        "encoding": encoding or work.config.preprocessing.encoding,
        "base_files": file_hashes(work.base.path),
        "rows": len(work.table),
        "columns": work.table.columns,
        "layout": asdict(work.layout),
    }


def _lock(work: Work, precision: str, origin: Origin | None) -> Lock:
    """What the run is made from. Versions, machine and plan are recorded; they do not make it another run."""
    recorded = versions() | {"python": platform.python_version()}
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
        versions=recorded,
        machine=asdict(work.machine),
        plan=asdict(work.plan),
        defaults=work.config.defaults,
        start_hash=origin.sha256 if origin is not None else "",
    )


def _trained(folder: RunFolder, standing: Standing, tuned: Tuned, work: Work) -> Trained:
    history: dict[str, dict[str, list[float]]] = {}
    for line in read_metrics(folder.metrics_path):
        of = history.setdefault(line["split"], {})
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("time", "step", "epoch"):
                of.setdefault(name, []).append(value)
    rows: dict[str, int] = {name: len(found) for name, found in work.prepared.examples.items()}
    found: Literal["new", "resumed", "finished"] = "resumed" if standing == "resume" else standing
    return Trained(
        folder.path.absolute(), folder.path, found, tuned, tuned.output, history, rows, work.audit, work.config.filled()
    )


def _name_of(dataset: Any) -> str:
    return Path(dataset).stem if isinstance(dataset, (str, Path)) else "run"
