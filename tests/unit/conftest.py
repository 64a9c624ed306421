"""Helpers that several folders of unit tests import stand beside their main user; make them importable."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in ("data", "plan", "model/decoder"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))
