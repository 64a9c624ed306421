"""What Ludwig has and Luthier refuses, by name, each with what to do instead."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

LATER = "this comes in a later version of Luthier"

# Path -> advice. A null value counts as absent. `*` is any list index.
KEYS: dict[str, str] = {
    "adapters": "give one `adapter:`; train several runs and choose between them at prediction",
    "hyperopt": "make one run per setting with `--set key=value` and compare them with `luthier runs`",
    "trust_remote_code": "remote code is never allowed by a file: pass --trust-remote-code on the command line, "
    "or trust_remote_code=True in Python",
    "combiner": "language models have no combiner; leave it out",
    "ludwig_version": "a note of the Ludwig that wrote the file; leave it out",
    "stages": f"{LATER}; train one run, then start the next from its adapter (adapter.pretrained_adapter_weights)",
    "retrieval": LATER,
    "calibration": LATER,
    "prompt.retrieval": f"{LATER}; put the retrieved text into a column and name it in the template",
    "preprocessing.oversample_minority": "use preprocessing.balance_classes",
    "preprocessing.undersample_majority": "use preprocessing.balance_classes",
    "preprocessing.cache_encoder_embeddings": "leave it out; nothing is embedded before training",
    "generation.max_length": "use generation.max_new_tokens",
    "generation.min_length": "use generation.min_new_tokens",
    "generation.penalty_alpha": "contrastive search left transformers; use top_p or min_p",
    "generation.num_beam_groups": "diverse beam search left transformers; use num_beams alone",
    "generation.diversity_penalty": "diverse beam search left transformers; use num_beams alone",
    "generation.force_words_ids": "constrained beam search left transformers; leave it out",
    "generation.prompt_lookup_num_tokens": "it changes speed only; leave it out",
    "generation.pad_token_id": "padding is the tokenizer's business; leave it out",
    "generation.bos_token_id": "prompts are made of ids already; leave it out",
    "generation.eos_token_id": "the tokenizer says what ends a turn; use generation.stop for more",
    "generation.sequence_bias": "use logit_bias, bad_words or bad_words_ids",
    "generation.forced_decoder_ids": "put the words into the prompt",
    "trainer.regularization_type": "use trainer.optimizer.weight_decay",
    "trainer.regularization_lambda": "use trainer.optimizer.weight_decay",
    "trainer.increase_batch_size_on_plateau": "use learning_rate_scheduler.reduce_on_plateau",
    "trainer.max_batch_size": "give batch_size itself; how much goes through at once is planned",
    "trainer.learning_rate_scaling": "give the learning rate for the effective batch, which is global",
    "trainer.bucketing_field": "passes hold similar lengths anyway; leave it out",
    "trainer.base_learning_rate": "give trainer.learning_rate",
    "trainer.effective_batch_size": "give batch_size; times gradient_accumulation_steps it is the effective batch",
    "trainer.enable_profiling": f"{LATER}; use your own profiler around `luthier train`",
    "trainer.skip_all_evaluation": "set max_eval_rows to 1 and eval_generation_rows to 0",
    "input_features.*.encoder": "language models read text through their tokenizer; leave it out",
    "input_features.*.prompt": "write the prompt at the top level",
    "input_features.*.tied": "features of a language model are not tied; leave it out",
    "output_features.*.loss": "the loss is trainer.loss_normalization",
    "output_features.*.encoder": "leave it out",
    "input_features.*.preprocessing.missing_value_strategy": "a missing value in a prompt is empty; leave it out",
    "output_features.*.preprocessing.missing_value_strategy": "rows without an answer are dropped and counted",
    "backend.cache_dir": "leave it out; the cache is LUTHIER_CACHE",
}

# Keys of one reason, by the mapping they stand in.
_READS = "the base model's tokenizer reads the text; leave it out"
_ALONE = "a language model has one output, which depends on no other; leave it out"
_PLAIN = "an answer is generated, not decoded from a vector; leave it out"
_SPEED = "it says how training is executed, which Luthier plans; leave it out (or pin it under `execution:`)"
_GROUPS: dict[tuple[str, str], tuple[str, ...]] = {
    ("*_features.*.preprocessing", _READS): (
        "pretrained_model_name_or_path", "tokenizer", "vocab_file", "most_common", "padding_symbol", "unknown_symbol",
        "padding", "lowercase", "ngram_size", "compute_idf", "cache_encoder_embeddings",
    ),
    ("*_features.*.preprocessing", "a missing value in a prompt is empty, a row without an answer is dropped"): (
        "fill_value", "computed_fill_value",
    ),
    ("*_features.*.preprocessing", "use preprocessing.max_sequence_length"): ("sequence_length",),
    ("*_features.*.preprocessing", "write the prompt at the top level"): ("prompt",),
    ("*_features.*", "it is made by Ludwig and is not for writing; leave it out"): ("proc_column", "active"),
    ("output_features.*", _ALONE): ("reduce_input", "reduce_dependencies", "dependencies"),
    ("output_features.*", _PLAIN): ("class_similarities", "top_k", "calibration", "vocab", "num_classes"),
    ("output_features.*", "use trainer.validation_metric"): ("default_validation_metric",),
    ("output_features.*.decoder", _PLAIN): (
        "str2idx", "tokenizer", "input_size", "output_size", "fc_layers", "num_fc_layers", "vocab_file",
    ),
    ("output_features.*.decoder", "use generation.max_new_tokens"): ("max_new_tokens",),
    ("trainer", "use learning_rate_scheduler.reduce_on_plateau"): (
        "increase_batch_size_on_plateau_patience", "increase_batch_size_on_plateau_rate",
        "increase_batch_size_eval_metric", "increase_batch_size_eval_split",
    ),
    ("trainer", "use trainer.steps_per_evaluation"): ("eval_steps",),
    ("trainer", "use adapter.layers_to_transform or adapter.exclude_modules"): ("layers_to_freeze_regex",),
    ("trainer", f"{LATER}; use your own profiler around `luthier train`"): ("profiler",),
    ("trainer", f"it belongs to training on preferences; {LATER}"): (
        "beta", "loss_type", "label_smoothing", "max_prompt_length", "num_generations", "ref_model",
    ),
    ("trainer.learning_rate_scheduler", "warm restarts are not part of Luthier; cosine ends at the end of training"): (
        "t_0", "t_mult",
    ),
    ("trainer.optimizer", "it changes how 8-bit states are kept; leave it out"): ("block_wise", "percentile_clipping"),
    ("trainer.optimizer", "sgd has no dampening here; leave it out"): ("dampening",),
    ("generation", "it changes memory or what is returned, not the answer; leave it out"): (
        "low_memory", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate",
    ),
    ("generation", "it is for encoder-decoder models; leave it out"): (
        "encoder_no_repeat_ngram_size", "decoder_start_token_id",
    ),
    ("generation", "assisted generation changes speed only; leave it out"): (
        "assistant_model", "num_assistant_tokens", "num_assistant_tokens_schedule",
    ),
    ("adapter", "the bits are quantization.bits, and one round is made: leave it out"): ("loftq_config",),
    ("adapter", "use target_modules, layers_to_transform or modules_to_save"): (
        "layers_pattern", "fan_in_fan_out", "lora_bias", "megatron_config", "trainable_token_indices",
        "layer_replication", "runtime_config",
    ),
    ("backend", _SPEED): ("cache_format", "processor", "trainer", "loader", "engine", "preprocessor_kwargs"),
    ("backend", "credentials never stand in a config; use the hub's own login"): ("credentials",),
    ("quantization", "bitsandbytes does it: give bits, 4 or 8"): ("backend", "mode"),
}  # fmt: skip
for (_holder, _advice), _names in _GROUPS.items():
    for _sides in ("input", "output") if _holder.startswith("*_") else ("",):
        KEYS.update({f"{_holder.replace('*_', f'{_sides}_', 1)}.{name}": _advice for name in _names})

_PREFERENCES = f"not yet: {LATER}; `finetune` on the chosen answers comes before it in any case"
_ADAPTER = "use lora, or one of adalora, ia3, vera, loha, lokr, oft, boft, ln_tuning"
_VIRTUAL = f"it trains virtual tokens, which Luthier has not: {_ADAPTER}"
# What Ludwig or PEFT have and Luthier has not
_ADAPTERS = (
    "fourierft", "c3a", "hra", "waveft", "vblora", "adaption_prompt", "xlora", "poly", "bone", "miss", "shira",
    "randlora", "road", "trainable_tokens", "osf", "delora", "gralora", "lily", "pvera", "tinylora", "psoft", "hira",
    "glora", "adamss", "beft", "unilora", "cartridge",
)  # fmt: skip
_OPTIMIZERS = {
    "use adamw": (
        "lbfgs", "adadelta", "adagrad", "adamax", "ftrl", "nadam", "rmsprop", "lars", "lamb", "radam", "ademamix",
        "muon", "schedule_free_adamw",
    ),
    "use adamw_8bit": ("adagrad_8bit", "rmsprop_8bit", "lars_8bit", "lamb_8bit", "ademamix_8bit"),
    "use paged_adamw_8bit": ("paged_ademamix_8bit",),
    "use paged_lion_8bit": ("paged_lion",),
    "use paged_adamw": ("paged_ademamix",),
    "use sgd, or adamw_8bit for small states": ("sgd_8bit",),
}  # fmt: skip
_FEATURE = "a language model reads and writes text: declare the column as text, or a category answer as category"

# Path -> {value: advice}
VALUES: dict[str, dict[str, str]] = {
    "model_type": dict.fromkeys(("ecd", "gbm"), "Luthier tunes language models: model_type llm"),
    "trainer.type": dict.fromkeys(
        ("dpo", "kto", "orpo", "grpo", "simpo", "ppo", "reward", "distill"), _PREFERENCES
    ),
    "trainer.learning_rate": {"auto": "leave it out for 2e-4 (2e-5 with `adapter: null`), or give a number"},
    "trainer.optimizer.type": {name: advice for advice, names in _OPTIMIZERS.items() for name in names},
    "adapter.type": dict.fromkeys(_ADAPTERS, _ADAPTER)
    | dict.fromkeys(("p_tuning", "prompt_tuning", "prefix_tuning", "multitask_prompt_tuning", "cpt"), _VIRTUAL),
    "backend.type": dict.fromkeys(("ray", "horovod", "deepspeed"), f"not yet: {LATER}; use local")
    | {"torchrun": "leave it local and start `torchrun --nproc-per-node=N $(which luthier) train CONFIG`"},
    **dict.fromkeys(
        ("input_features.*.type", "output_features.*.type"),
        dict.fromkeys(
            (
                "number", "numerical", "binary", "set", "bag", "sequence", "timeseries", "image", "audio", "date", "h3",
                "vector", "anomaly",
            ),
            _FEATURE,
        ),
    ),
    "output_features.*.decoder.type": {"text_parser": "use text_extractor"},
}  # fmt: skip

Refusal = tuple[tuple[str | int, ...], Any, str]


def refusals(data: Any) -> list[Refusal]:
    """The refused things in ``data`` as (path, value, advice); each is taken out, so that it is told once."""
    found: list[Refusal] = []
    for pattern, advice in KEYS.items():
        for holder, path in _holders(data, pattern):
            name = str(path[-1])
            value = holder.pop(name)
            if value is not None and not (pattern == "prompt.retrieval" and _is_unset(value)):
                found.append((path, value, advice))
    for pattern, values in VALUES.items():
        for holder, path in _holders(data, pattern):
            name = str(path[-1])
            value = holder[name]
            said = next((said for like, said in values.items() if fnmatchcase(str(value).lower(), like)), None)
            if isinstance(value, str) and said is not None:
                found.append((path, value, said))
                del holder[name]
                if path == ("adapter", "type"):
                    data["adapter"] = {"type": "lora"}  # its other keys mean nothing without it
                elif path == ("trainer", "optimizer", "type"):
                    data["trainer"]["optimizer"] = {}  # nor do these
    return found


def _is_unset(retrieval: Any) -> bool:
    """Whether this is the section as Ludwig writes it where nothing is retrieved: all keys at their defaults."""
    return isinstance(retrieval, dict) and all(v is None or (k == "k" and v == 0) for k, v in retrieval.items())


def _holders(data: Any, pattern: str) -> list[tuple[dict[str, Any], tuple[str | int, ...]]]:
    """The mappings that hold the last key of ``pattern``, each with the whole path."""
    *parents, last = pattern.split(".")
    level: list[tuple[Any, tuple[str | int, ...]]] = [(data, ())]
    for part in parents:
        level = [
            (child, (*path, name))
            for node, path in level
            for name, child in _children(node)
            if part in ("*", name) and (part != "*" or isinstance(name, int))
        ]
    return [(node, (*path, last)) for node, path in level if isinstance(node, dict) and last in node]


def _children(node: Any) -> list[tuple[str | int, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list) else []
