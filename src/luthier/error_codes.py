"""The stable error codes: what causes each, what is allowed instead, how to mend it. ``docs/errors/`` is made from it.

A code never changes its meaning. Codes are grouped by their prefix: config, data, asset, run, training, dependency.
What is allowed and the fix are the general ones, said where the place that raises knows no better.
"""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """What a code says by itself. A part is None where nothing could be said: nothing is wrong with the input."""

    cause: str
    allowed: str | None
    fix: str | None


CODES: dict[str, Code] = {
    # config
    "config-unreadable": Code(
        "The config file does not exist, is not valid YAML 1.2, or is not a mapping.",
        "a YAML 1.2 file (or a mapping in Python) of keys such as `base_model: smollm2`",
        "mend the file at that place; `luthier init DATA` writes a config",
    ),
    "config-unknown-key": Code(
        "A key that the schema does not have; often a misspelling.",
        "the keys that `luthier schema` lists",
        "leave it out; `luthier schema` lists every key",
    ),
    "config-duplicate-key": Code("The same key stands twice in one mapping.", "each key once in a mapping", "keep one"),
    "config-bad-value": Code(
        "A value of the wrong type or outside its range.",
        "the values that docs/reference/config.md lists",
        "give one of the allowed values, or leave it out for the default",
    ),
    "config-not-implemented": Code(
        "A key that Ludwig has and Luthier refuses, with what to do instead.",
        "the keys that `luthier schema` lists",
        "leave it out",
    ),
    "config-conflict": Code("Two keys that cannot both hold.", "one of the two", "leave one of the two out"),
    "config-bad-override": Code(
        "A --set option that is not key.path=value.",
        "key.path=value, the value written as in YAML",
        "write it as in --set trainer.epochs=1",
    ),
    "config-usage": Code(
        "A command line that cannot be understood: an unknown option or command, an argument missing or too much.",
        "the options and arguments that `luthier COMMAND --help` lists",
        "luthier COMMAND --help",
    ),
    # data
    "data-unreadable": Code(
        "A dataset that does not exist or cannot be parsed as its format.",
        "a whole file of the format that its suffix names",
        "mend the file at that place, or export it again",
    ),
    "data-empty": Code(
        "A dataset without rows.",
        "a table with a header and at least one row",
        "add rows, or name the file that holds them",
    ),
    "data-encoding": Code(
        "Bytes that are not valid in the encoding, or an encoding that cannot be told.",
        "text in one encoding: UTF-8, or another that is named",
        "save the file as UTF-8, or name its encoding with --encoding (preprocessing.encoding)",
    ),
    "data-ragged": Code(
        "A row with more or fewer fields than the header.",
        "as many fields in each row as in the header",
        "put quotes around a field that holds the separator, or fill in the missing fields",
    ),
    "data-limit": Code(
        "A file or field beyond a configured limit.",
        "sizes up to preprocessing.limits",
        "split the file, or raise the limit in preprocessing.limits (--set) if you trust it",
    ),
    "data-missing-column": Code(
        "A column that the config or the template names and the table lacks.",
        "the columns of the table",
        "name a column of the table",
    ),
    "data-template": Code(
        "A prompt template that is malformed, names no column, or uses a refused construct.",
        "text with {column} fields; {{ and }} for braces that are text",
        "correct the template",
    ),
    "data-chat": Code(
        "A conversation whose roles or shape cannot be understood.",
        'turns such as {"role": "user", "content": "…"} or {"from": "human", "value": "…"}',
        "mend the row, or take it out of the table",
    ),
    "data-split": Code(
        "A split that leaves no training rows, or a split column with unknown values.",
        "train, validation and test, with at least one row in train",
        "mend the split column or preprocessing.split",
    ),
    "data-no-target": Code(
        "No column to learn from was given or could be derived.",
        "one column with the answers, beside those with the questions",
        "name it: luthier init DATA --input COLUMN,COLUMN --target COLUMN (input_features and output_features)",
    ),
    "data-no-supervision": Code(
        "Not one token of the dataset would be trained.",
        "at least one training row with an answer that fits the maximum length",
        "fill in the target column, or raise preprocessing.max_sequence_length",
    ),
    "data-prompt": Code(
        "A prompt that cannot be answered: no text, empty, or no room for its answer in the context or in memory.",
        "a text that leaves room for its answer in the model's context",
        "shorten it, or lower max_new_tokens",
    ),
    "data-too-long": Code(
        "A row longer than the maximum under the policy 'error'.",
        "rows of at most preprocessing.max_sequence_length tokens",
        "raise preprocessing.max_sequence_length, shorten the row, or set preprocessing.truncation",
    ),
    # assets
    "asset-not-found": Code(
        "A base model that is not in the cache, a package, a folder, or the hub.",
        "an alias such as smollm2, a hub id such as owner/name, a model's folder, or a .gguf file",
        "check the name; get the model again if files of it are gone",
    ),
    "asset-no-tokenizer": Code(
        "A base model whose files hold no tokenizer.",
        "a model folder with tokenizer.json",
        "copy the tokenizer's files of the original model into the folder",
    ),
    "asset-pickled-weights": Code(
        "A base model that only has pickled weights, which are never loaded.",
        "*.safetensors",
        "luthier convert FOLDER",
    ),
    "asset-remote-code": Code(
        "A base model that wants to run code of its own.",
        "a base of an architecture that transformers itself has",
        "read that code; then pass trust_remote_code=True (Python) or --trust-remote-code (command line)",
    ),
    "asset-gated": Code(
        "A base model behind a licence that has to be accepted first.",
        "a base whose licence you have accepted, or one without a gate",
        "accept the licence on the model's page, then run `hf auth login` (or set HF_TOKEN)",
    ),
    "asset-damaged": Code(
        "Model files that are incomplete or whose content does not match.",
        "whole files, as their publisher wrote them",
        "get the files again",
    ),
    "asset-wrong-base": Code(
        "An adapter on a base model that it was not trained on.",
        "the base model that it was trained on",
        "put the original base model where it was, or train again",
    ),
    "asset-unsupported": Code(
        "A model or an adapter kind that cannot be used this way.",
        "a causal language model of an architecture that transformers has, and an adapter that fits it",
        "choose another base (`luthier init` proposes some), or another adapter.type",
    ),
    "asset-tokenizer-bounds": Code(
        "A tokenizer that takes too long to load or for a text, or could make far more of it.",
        "a tokenizer that reads text once, from left to right",
        "use the model of a publisher you trust",
    ),
    "asset-upload": Code(
        "An upload that the hub did not take: the name, the right to write, or the connection.",
        "owner/name, with a token that may write there",
        "log in with `hf auth login`, or pass token=",
    ),
    # runs
    "run-not-a-run": Code(
        "A folder that is not a run folder, or has no trained model in it.",
        "a run folder that `luthier train` has finished",
        "`luthier runs` lists them; train first where there is none",
    ),
    "run-foreign-files": Code(
        "An output folder that holds files of something else.",
        "a folder that is absent or empty",
        "name another folder",
    ),
    "run-other-lock": Code(
        "An output folder whose run was made from another config, data or base.",
        "the same config, data and base model",
        "choose another --output folder",
    ),
    "run-in-use": Code(
        "A run folder that another process is writing to.",
        "one process at a time",
        "wait for it to end, or choose another --output",
    ),
    "run-no-table": Code(
        "The table a run was trained on is needed again, and was not a file, is gone, or has changed.",
        "the table of the training, unchanged",
        "put it back, or name rows with answers: --dataset FILE",
    ),
    "run-not-writable": Code(
        "A run folder or an output file that cannot be written: read-only, not permitted, or its disk failed.",
        "a folder that you may write to",
        "choose an --output folder on a disk that you may write to",
    ),
    "run-no-space": Code(
        "Not enough disk space for what the run will write.",
        "a disk with room for what is written",
        "free some space, or choose a folder on another disk",
    ),
    "run-interrupted": Code(
        "The run was ended by SIGINT or SIGTERM, after a checkpoint at its last finished step.", None, None
    ),
    "run-damaged": Code(
        "A checkpoint, a trained model or a record whose content does not match its manifest.",
        "whole files, as Luthier wrote them",
        "restore the file from a copy or a mirror, or begin again in another --output folder",
    ),
    # training
    "training-not-finite": Code(
        "A loss or gradient that is NaN or infinite; nothing was updated with it.",
        "losses and gradients that are finite numbers",
        "lower trainer.learning_rate, or set trainer.precision: fp32",
    ),
    "training-spike": Code(
        "A loss that jumps far above those before it, again after every rewind that is allowed.",
        "a loss near those of the steps before",
        "lower trainer.learning_rate, or look at the rows",
    ),
    "training-no-memory": Code(
        "Out of memory.",
        "what fits in free memory (`luthier plan` shows it)",
        "lower preprocessing.max_sequence_length, or choose a smaller base",
    ),
    "training-rank-lost": Code(
        "Another process of a run on several ranks has ended.",
        "all processes of the run, to its end",
        "see what the other process has printed; then run the same command again",
    ),
    # dependencies
    "dependency-missing": Code(
        "An optional package is needed and not installed.", "the package, installed", "pip install it"
    ),
    "dependency-failed": Code(
        "A package that a run reports to, or lets answer, is installed and could not begin, or ended.",
        "the package, working",
        "look above for what it wrote itself, or leave it out of the config",
    ),
}
