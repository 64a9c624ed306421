"""The run folder: state, lock, metrics, atomic writes. Free of torch."""

from luthier.run.folder import RunFolder, list_runs, not_writable, numbered, require_space, slug
from luthier.run.inputs import Inputs, recorded_inputs
from luthier.run.lock import Lock, diff, drift, hash_config
from luthier.run.metrics import MetricsWriter, read_metrics

__all__ = [
    "Inputs",
    "Lock",
    "MetricsWriter",
    "RunFolder",
    "diff",
    "drift",
    "hash_config",
    "list_runs",
    "not_writable",
    "numbered",
    "read_metrics",
    "recorded_inputs",
    "require_space",
    "slug",
]
