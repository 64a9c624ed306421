"""Every key of Ludwig's LLM schema means here what it means there, or is refused by name with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.config import load
from luthier.errors import ConfigError

# Where a key stands in Ludwig's schema -> the keys, each with a value that is valid there.
LUDWIG: dict[str, dict[str, Any]] = {
    "trainer": {
        "learning_rate": 0.0001, "epochs": 1, "train_steps": 5, "steps_per_checkpoint": 2, "checkpoints_per_epoch": 1,
        "eval_steps": 3, "early_stop": 5, "batch_size": 1, "max_batch_size": 4, "eval_batch_size": 2,
        "evaluate_training_set": True, "regularization_type": "l2", "regularization_lambda": 0.1,
        "should_shuffle": True, "increase_batch_size_on_plateau": 1, "increase_batch_size_on_plateau_patience": 5,
        "increase_batch_size_on_plateau_rate": 2.0, "increase_batch_size_eval_metric": "loss",
        "increase_batch_size_eval_split": "training", "learning_rate_scaling": "linear", "bucketing_field": "x",
        "use_mixed_precision": True, "compile": True, "enable_gradient_checkpointing": True, "validation_field": "o",
        "validation_metric": "loss", "gradient_accumulation_steps": 4, "effective_batch_size": 8,
        "skip_all_evaluation": True, "enable_profiling": True, "profiler": {"wait": 1}, "base_learning_rate": 0.0,
        "beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.1, "max_prompt_length": 10, "num_generations": 2,
        "ref_model": "x", "layers_to_freeze_regex": "x",
    },
    "trainer.learning_rate_scheduler": {
        "decay": "cosine", "decay_rate": 0.9, "decay_steps": 10, "staircase": True, "reduce_on_plateau": 1,
        "reduce_on_plateau_patience": 1, "reduce_on_plateau_rate": 0.1, "warmup_evaluations": 1,
        "warmup_fraction": 0.1, "reduce_eval_metric": "loss", "reduce_eval_split": "training", "t_0": 5, "t_mult": 1,
        "eta_min": 0,
    },
    "trainer.gradient_clipping": {
        "clipglobalnorm": 0.5, "clipnorm": 1.0, "clipvalue": 1.0,
    },
    "trainer.optimizer": {
        "type": "adam", "lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0, "amsgrad": True,
        "momentum": 0.9, "dampening": 0, "nesterov": True, "block_wise": True, "percentile_clipping": 100,
    },
    "preprocessing": {
        "sample_ratio": 0.5, "sample_size": 5, "oversample_minority": 0.5, "undersample_majority": 0.5,
        "global_max_sequence_length": 64, "cache_encoder_embeddings": True,
    },
    "preprocessing.split": {
        "type": "random", "probabilities": [0.7, 0.1, 0.2], "column": "x",
    },
    "generation": {
        "max_new_tokens": 3, "min_new_tokens": 1, "max_length": 3, "min_length": 1, "early_stopping": True,
        "max_time": 5.0, "do_sample": True, "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0.1,
        "use_cache": True, "prompt_lookup_num_tokens": 1, "temperature": 0.1, "top_k": 1, "top_p": 0.9,
        "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "diversity_penalty": 0.1,
        "repetition_penalty": 1.1, "encoder_repetition_penalty": 1.1, "length_penalty": 1.1,
        "no_repeat_ngram_size": 1, "bad_words_ids": [[1]], "force_words_ids": [[1]], "renormalize_logits": True,
        "forced_bos_token_id": 1, "forced_eos_token_id": 1, "remove_invalid_values": True,
        "exponential_decay_length_penalty": [1, 1.0], "suppress_tokens": [1], "begin_suppress_tokens": [1],
        "forced_decoder_ids": [[1, 2]], "sequence_bias": {}, "guidance_scale": 1.0, "low_memory": True,
        "num_return_sequences": 1, "output_attentions": True, "output_hidden_states": True, "output_scores": True,
        "return_dict_in_generate": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 1, "num_assistant_tokens": 1,
        "num_assistant_tokens_schedule": "x", "assistant_model": "x",
    },
    "adapter": {
        "type": "lora", "r": 8, "alpha": 16, "dropout": 0.05, "bias_type": "none", "target_modules": ["q_proj"],
        "use_dora": True, "use_rslora": True, "init_lora_weights": "pissa", "loraplus_lr_ratio": 2.0,
        "rank_pattern": {}, "alpha_pattern": {},
        "postprocessor": {"merge_adapter_into_base_model": True, "progressbar": True}, "layers_to_transform": [1],
        "layers_pattern": "x", "exclude_modules": ["a"], "fan_in_fan_out": True, "lora_bias": True, "eva_config": {},
        "corda_config": {}, "loftq_config": {}, "megatron_config": {}, "trainable_token_indices": [1],
        "layer_replication": [[0, 1]], "runtime_config": {},
    },
    "quantization": {
        "bits": 4, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4", "backend": "bitsandbytes", "mode": "x",
    },
    "model_parameters": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "neftune_noise_alpha": 5,
    },
    "prompt": {
        "template": "{x}", "task": "t", "retrieval": {"type": "random", "k": 1},
    },
    "prompt.retrieval": {
        "index_name": "a", "model_name": "b",
    },
    "backend": {
        "type": "local", "cache_dir": "x", "cache_format": "x", "processor": {}, "trainer": {"strategy": "ddp"},
        "loader": {}, "engine": "x", "credentials": {},
    },
    "": {
        "model_type": "llm", "adapters": {"a": {}}, "hyperopt": {}, "ludwig_version": "0.1",
        "trust_remote_code": True, "combiner": {}, "defaults": {"text": {}}, "calibration": {},
    },
    "input_features.0": {
        "name": "a", "type": "text", "column": "b", "proc_column": "c", "encoder": {}, "prompt": {}, "tied": "x",
        "active": True, "preprocessing": {"max_sequence_length": 5},
    },
    "input_features.0.preprocessing": {
        "pretrained_model_name_or_path": "x", "tokenizer": "space", "vocab_file": "x", "sequence_length": 5,
        "max_sequence_length": 8, "most_common": 5, "padding_symbol": "x", "unknown_symbol": "x", "padding": "right",
        "lowercase": True, "missing_value_strategy": "fill_with_const", "fill_value": "", "computed_fill_value": "",
        "ngram_size": 2, "cache_encoder_embeddings": True, "compute_idf": True, "prompt": {},
    },
    "output_features.0": {
        "name": "a", "type": "text", "column": "b", "proc_column": "x", "encoder": {},
        "loss": {"type": "next_token_softmax_cross_entropy"}, "decoder": {"type": "text_extractor"},
        "reduce_input": "sum", "reduce_dependencies": "sum", "dependencies": ["x"], "class_similarities": [[1]],
        "top_k": 3, "default_validation_metric": "loss", "calibration": True,
        "preprocessing": {"max_sequence_length": 5},
    },
    "output_features.0.decoder": {
        "match": {"a": {"type": "contains", "value": "x"}}, "str2idx": {}, "fallback_label": "a", "tokenizer": "x",
        "input_size": 5, "max_new_tokens": 3, "fc_layers": [],
    },
    "output_features.0.preprocessing": {
        "fallback_label": "x", "cache_encoder_embeddings": True, "most_common": 4, "lowercase": True,
        "tokenizer": "x", "vocab_file": "x", "missing_value_strategy": "drop_row", "fill_value": "x",
        "padding_symbol": "x",
    },
}  # fmt: skip
KEYS = [(f"{holder}.{name}".lstrip("."), value) for holder, keys in LUDWIG.items() for name, value in keys.items()]


def config_with(path: str, value: Any) -> dict[str, Any]:
    """The smallest config that has ``value`` at ``path``."""
    inner: Any = value
    for part in reversed(path.split(".")):
        inner = [inner] if part == "0" else {part: inner}
    config = {"base_model": "smollm2", **inner}
    for features in ("input_features", "output_features"):
        if features in config:
            config[features][0].setdefault("name", "n")
    if path.startswith("output_features.0.decoder"):
        config["output_features"][0]["type"] = "category"
        config["output_features"][0]["decoder"].setdefault("type", "category_extractor")
    for section, needs in (("adapter", ("type", "lora")), ("quantization", ("bits", 4))):
        if section in config:
            config[section].setdefault(*needs)
    if path.split(".")[-1] in ("momentum", "nesterov"):
        config["trainer"]["optimizer"]["type"] = "sgd"
        config["trainer"]["optimizer"].setdefault("momentum", 0.9)
    return config


@pytest.mark.parametrize(("path", "value"), KEYS, ids=[path for path, _ in KEYS])
def test_each_key_of_ludwig_works_or_is_refused_by_name(path: str, value: Any) -> None:
    try:
        load(config_with(path, value))
    except ConfigError as error:
        assert [fault.code for fault in error.faults] == ["config-not-implemented"], str(error)
        assert path.split(".")[0] in error.faults[0].message and error.faults[0].fix


@pytest.mark.parametrize(
    ("path", "value", "instead"),
    [
        *(("trainer.optimizer", name, "adamw") for name in (
            "lbfgs", "adadelta", "adagrad", "adamax", "ftrl", "nadam", "rmsprop", "lars", "radam", "RMSProp", "lamb",
            "adagrad_8bit", "rmsprop_8bit", "lars_8bit", "lamb_8bit", "sgd_8bit",
        )),
        ("trainer.optimizer", "paged_lion", "paged_lion_8bit"),
        *(("adapter", name, "use lora") for name in (
            "p_tuning", "prompt_tuning", "prefix_tuning", "multitask_prompt_tuning", "xlora", "poly", "randlora",
        )),
    ],
)  # fmt: skip
def test_values_that_ludwig_has_are_refused_by_name(path: str, value: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config_with(path, {"type": value, "momentum": 0.9, "own_key": 3}))
    (fault,) = caught.value.faults
    assert fault.code == "config-not-implemented" and value in fault.message and instead in (fault.fix or "")
