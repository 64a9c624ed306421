"""Why a split leaves no row for validation, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.data.sources.splits import SPLIT_COLUMN

if TYPE_CHECKING:
    from luthier.data.split import Job


def why(job: Job, kind: str, duplicates: int, near: int) -> str:
    """The reason. ``duplicates``: rows that repeat another; ``near``: rows that are nearly like another."""
    if kind == "fixed":
        return f"the column {job.config.column or SPLIT_COLUMN!r} puts none there"
    if not job.shares[1]:
        return "preprocessing.split.probabilities leaves none for it"
    rows, sets = len(job.table), len(job.units) + len(job.alone)
    if sets == rows:
        return f"{rows:,} rows are too few to set one aside"
    reasons = [f"{duplicates:,} repeat another" if duplicates else "",
               f"{near:,} are nearly like another (preprocessing.near_duplicates: false parts these)" if near else "",
               f"{job.config.group!r} groups them" if job.config.group is not None else ""]  # fmt: skip
    together = " and ".join(filter(None, reasons))
    return f"of {rows:,} rows {together}, and what belongs together stays so: that is {sets:,} " + (
        "set" if sets == 1 else "sets"
    )
