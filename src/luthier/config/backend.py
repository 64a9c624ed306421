"""The `backend:` section: where a run is executed."""

from __future__ import annotations

from typing import Literal

from luthier.config.section import Section, key


class Backend(Section):
    """Where a run is executed."""

    type: Literal["local"] = key("local", "This process, or as many of them as torchrun starts.")
