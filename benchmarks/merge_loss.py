"""What an adapter that was trained on a base in 4 bits loses on the base as it is, and merged into it.

    python benchmarks/merge_loss.py --out benchmarks/results/merge_loss.json

The demo (`examples/dictionary`: r 16 on all linear layers of the built-in model, one epoch) with its base in NF4. Then
the loss over the demo's test rows, which training has not seen, in fp32 arithmetic: of the base and of the adapter on
it, in NF4 and as it is, and of the merged weights as Luthier writes them. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from luthier import config
from luthier.config import Config
from luthier.events import Event, Stepped, silent
from luthier.export.merge import merged
from luthier.model import adapters
from luthier.model.load import load_base
from luthier.pipeline import train
from luthier.pipeline.finishing import versions
from luthier.pipeline.opening import open_base, open_tuned
from luthier.pipeline.preparing import Work, prepare
from luthier.run import RunFolder
from luthier.train.evaluation import Evaluator
from luthier.train.passes import planned

DEMO = Path(__file__).parents[1] / "examples" / "dictionary" / "config.yaml"
DATASET = DEMO.with_name("dictionary.csv")
HERE = ("execution={device: cpu}", "trainer.eval_generation_rows=0")
IN_4_BITS = "quantization={bits: 4}"
IN_FP32 = "quantization.bnb_4bit_compute_dtype=float32"


def settings_of(*more: str) -> Config:
    """The demo's config with changes."""
    return config.load(DEMO, overrides=[*HERE, *more])


def loss_of(settings: Config, work: Work, run: RunFolder | None = None, folder: Path | None = None) -> float:
    """Over the supervised tokens of the test rows: a base, a run's adapter on it, or merged weights in a folder."""
    base = work.base if folder is None else replace(work.base, path=folder)
    model = (
        open_base(settings, base, "fp32", "cpu", silent)
        if run is None
        else open_tuned(settings, base, "fp32", "cpu", run, silent)
    )
    examples = work.prepared.examples["test"]
    plan = replace(work.plan, share_prefix=0)  # transformers' way to run a base in 4 bits knows no shared prefixes
    found = Evaluator(model=model.module, score=model.score, examples=examples)(planned(plan))
    return found["loss"]


def main() -> None:
    """Train, merge, and print or write the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path, help="the folder of the run, which is gone on with where it is there")
    given = parser.parse_args()
    plain, four = settings_of(), settings_of(IN_4_BITS, IN_FP32)
    work = prepare(plain, DATASET)
    losses = {"base in NF4": loss_of(four, work), "base as it is": loss_of(plain, work)}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run = RunFolder.load(
            train(settings_of(IN_4_BITS), DATASET, output=given.run or place / "run", sink=shown).folder
        )
        losses["adapter on NF4, as trained"] = loss_of(four, work, run)
        losses["adapter on the base as it is"] = loss_of(plain, work, run)
        adapted = adapters.load_adapter(load_base(work.base), run.adapter, expect_base_hash=work.base.content_hash)
        for dtype in ("fp32", "bf16"):
            folder = merged(adapted, place / dtype, tokenizer_from=work.base.path, dtype=dtype)
            losses[f"merged into the base as it is, {dtype}"] = loss_of(plain, work, folder=folder)
    examples = work.prepared.examples["test"]
    found = {
        "rows": len(examples),
        "supervised_tokens": sum(sum(weight != 0 for weight in one.weights) for one in examples),
        "loss": losses,
        "versions": versions(),
    }
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shown(event: Event) -> None:
    """A line for each step."""
    if isinstance(event, Stepped):
        print(event.split, event.step, round(event.loss, 4), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
