"""What tuning changed: `compare` scores contestants on held-out rows, `write_report` shows a whole run in one page."""

from luthier.evaluate.compare import Comparison, Contestant, Flip, Sample, compare
from luthier.evaluate.few_shot import few_shot
from luthier.evaluate.report import write_report

__all__ = ["Comparison", "Contestant", "Flip", "Sample", "compare", "few_shot", "write_report"]
