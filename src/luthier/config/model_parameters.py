"""The `model_parameters:` section: small changes to the base model itself."""

from __future__ import annotations

from typing import Literal

from luthier.config.section import Float, Section, key


class RopeScaling(Section):
    """Stretch the positions, for texts longer than the base was trained on."""

    rope_type: Literal["linear", "dynamic"] = key(..., "How positions are stretched.")
    factor: Float = key(..., "By how much the context grows.", gt=1)


class ModelParameters(Section):
    """Small changes to the base model."""

    rope_scaling: RopeScaling | None = key(None, "Stretch the positions; empty: as the base was trained.")
    neftune_noise_alpha: Float = key(0.0, "Noise on the embeddings while training (NEFTune); 0 is off.", ge=0)
