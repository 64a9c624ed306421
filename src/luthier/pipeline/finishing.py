"""What a run leaves beside its weights: the merged model, the report, the model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from luthier import config, events
from luthier.pipeline.preparing import Work
from luthier.run import RunFolder, read_metrics
from luthier.run.verify import MERGED
from luthier.tuned import Tuned

# What a run's result may depend on; recorded in its lock.
VERSIONED = ("luthier", "torch", "transformers", "peft", "tokenizers", "bitsandbytes", "numpy")


def versions() -> dict[str, str]:
    """Package → version of everything that a result may depend on."""
    return {name: _version(name) for name in VERSIONED}


def merge(work: Work, folder: RunFolder, sink: events.Sink) -> None:
    """The adapter as it was saved, added to the base in fp32 on the CPU, beside it in ``merged/``."""
    from luthier.export.merge import merged
    from luthier.model import adapters
    from luthier.model.load import load_base

    path = folder.path / MERGED  # it may be there, of an attempt that ended before the run was finished
    model = load_base(work.base, model_parameters=work.config.model_parameters, sink=sink)
    adapted = adapters.load_adapter(model, folder.adapter, expect_base_hash=work.base.content_hash)
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    dtype = names.get(work.base.spec.dtype, "fp32")
    merged(adapted, path, tokenizer_from=work.base.path, dtype=dtype, replace=True, sink=sink)


def report(folder: RunFolder, tuned: Tuned, work: Work) -> None:
    """report.html and the model card beside the weights, both with a few answers of before and after."""
    from luthier.data.language import language_of
    from luthier.evaluate.report import write_report
    from luthier.export.card import write_card
    from luthier.metrics import METRICS

    samples = tuned.samples()
    write_report(
        folder.path,
        config=work.config.to_dict(),
        audit=work.audit.to_json(),
        metrics_lines=read_metrics(folder.metrics_path),
        samples=samples,
        calibration=tuned.calibration,
        machine=work.machine,
        versions=versions(),
    )
    model = folder.model_path
    assert model is not None, "training has saved what it trained"
    best = _best(folder)
    scores = {name: value for name, value in best.items() if name in METRICS}
    language = language_of(work.table, [*work.layout.inputs, *([work.layout.target] if work.layout.target else [])])
    write_card(
        model,
        name=work.config.name or folder.path.name,
        base_model=work.config.base_model,
        config_yaml=config.dump_yaml(work.config),
        scores={"tuned, on validation rows": scores} if scores else None,
        rows=len(work.prepared.rows["train"]),
        calibration=tuned.calibration,
        samples=samples,
        held_out=len(work.prepared.rows["validation"][: work.config.trainer.eval_generation_rows]),
        adapter=work.config.adapter.type if work.config.adapter is not None else None,
        language=[language] if language else [],
        versions=versions(),
    )


def _best(folder: RunFolder) -> Mapping[str, float]:
    """The evaluation of the weights that were kept; empty without validation rows."""
    outcome = folder.read_json("outcome.json")
    found = [one for one in outcome["evaluations"] if one["step"] == outcome["best_step"]]
    return found[-1] if found else {}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
