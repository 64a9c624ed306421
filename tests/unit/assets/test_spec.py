"""The facts of a model are read from its config.json under every name that transformers reads them by."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.assets.measures import check_sizes
from luthier.assets.spec import spec_of
from luthier.errors import AssetError

NAMED = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
         "kv_heads": "num_key_value_heads", "vocab": "vocab_size", "context": "max_position_embeddings"}  # fmt: skip
APART = {"blt", "gemma4_assistant", "musicgen", "musicgen_melody"}  # parts of other models, not bases of text
DOUBLED = {"longcat_flash": {"layers"}, "xlnet": {"context"}}  # transformers counts each layer twice; no limit is -1


def _configs() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return sorted(set(NAMES) - APART)


def test_sizes_are_what_transformers_reads() -> None:
    """Of every causal language model that transformers has: what its config calls layers, width, heads and context."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wrong = {}
    for kind in _configs():
        config = CONFIG_MAPPING[kind]()
        spec, text = spec_of(config.to_dict(), 1, "float32"), config.get_text_config(decoder=True)
        for ours, theirs in NAMED.items():
            try:
                known = getattr(text, theirs, None)
            except Exception:  # layers of their own sizes have none in common
                continue
            if isinstance(known, int) and getattr(spec, ours) != known and ours not in DOUBLED.get(kind, ()):
                wrong[kind, ours] = (getattr(spec, ours), known)
    assert not wrong


@pytest.mark.parametrize(
    ("config", "layers", "hidden", "inner", "heads", "kv", "context"),
    [
        ({"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": None}, 2, 32, 128, 4, 4, 0),
        ({"num_layers": 2, "d_model": 32, "attention_heads": 4, "ffn_dim": 64}, 2, 32, 64, 4, 4, 0),
        ({"n_layers": 3, "d_model": 32, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 99}, 3, 32, 64, 4, 4, 99),
        ({"n_layers": 2, "d_model": 32, "n_heads": 4, "attn_config": {"kv_n_heads": 2},
          "ffn_config": {"ffn_hidden_size": 48}}, 2, 32, 48, 4, 2, 0),
        ({"layers_block_type": ["mamba", "moe", "attention"], "hidden_size": 32}, 3, 32, 128, 0, 0, 0),
    ],
    ids=["gpt-neo", "xglm", "mpt", "dbrx", "nemotron-h"],
)  # fmt: skip
def test_names_of_other_families(
    config: dict[str, object], layers: int, hidden: int, inner: int, heads: int, kv: int, context: int
) -> None:
    spec = spec_of(config | {"vocab_size": 96}, 1, "float32")
    found = (spec.layers, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.context)
    assert found == (layers, hidden, inner, heads, kv, context)


def test_what_is_not_said_is_told_with_the_names_it_may_have() -> None:
    config = {"model_type": "other", "hidden_size": 32, "vocab_size": 96, "depth": 2}
    with pytest.raises(AssetError) as caught:
        check_sizes(config, spec_of(config, 10_000, "float32"), Path("config.json"))
    fault = caught.value.faults[0]
    assert fault.message.endswith(": layers")
    assert "num_layers" in str(fault.allowed) and "num_hidden_layers" in str(fault.fix)
