"""The composition root: who meets whom, and in which order. It alone knows all parts; the parts know no other.

config + dataset ── preparing.prepare ──▶ Work: base, tokenizer, table, layout, examples, plan (no weights yet)
Work ── opening.open_for_tuning ──▶ Tunable: the weights, an adapter on them, an engine to ask them
Work + Tunable ── training.train ──▶ run folder + Tuned
run folder ── loading.load ──▶ Tuned (see `luthier.tuned`)
run folders over one base ── together.load_together ──▶ Together: a Tuned each, one engine (brings in torch)
"""

from luthier.pipeline.evaluating import evaluate
from luthier.pipeline.loading import load, untuned
from luthier.pipeline.preparing import Work, check, prepare
from luthier.pipeline.training import Trained, train

__all__ = ["Trained", "Work", "check", "evaluate", "load", "prepare", "train", "untuned"]
