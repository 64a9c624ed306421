"""The stable error codes, one line on each: what causes it. ``docs/errors/`` is generated from this table.

A code never changes its meaning. Codes are grouped by their prefix: config, data, asset, run, training, dependency.
"""

from __future__ import annotations

CODES: dict[str, str] = {
    # config
    "config-unreadable": "The config file does not exist, is not valid YAML 1.2, or is not a mapping.",
    "config-unknown-key": "A key that the schema does not have; often a misspelling.",
    "config-duplicate-key": "The same key stands twice in one mapping.",
    "config-bad-value": "A value of the wrong type or outside its range.",
    "config-not-implemented": "A key that Ludwig has and Luthier refuses, with what to do instead.",
    "config-conflict": "Two keys that cannot both hold.",
    "config-bad-override": "A --set option that is not key.path=value.",
    # data
    "data-unreadable": "A dataset that does not exist or cannot be parsed as its format.",
    "data-empty": "A dataset without rows.",
    "data-encoding": "Bytes that are not valid in the encoding, or an encoding that cannot be told.",
    "data-ragged": "A row with more or fewer fields than the header.",
    "data-limit": "A file or field beyond a configured limit.",
    "data-missing-column": "A column that the config or the template names and the table lacks.",
    "data-template": "A prompt template that is malformed or uses a refused construct.",
    "data-chat": "A conversation whose roles or shape cannot be understood.",
    "data-split": "A split that leaves no training rows, or a split column with unknown values.",
    "data-no-target": "No column to learn from was given or could be derived.",
    "data-no-supervision": "Not one token of the dataset would be trained.",
    "data-prompt": "A prompt that cannot be answered: empty, or no room for its answer in the context or in memory.",
    "data-too-long": "A row longer than the maximum under the policy 'error'.",
    # assets
    "asset-not-found": "A base model that is not in the cache, a package, a folder, or the hub.",
    "asset-no-tokenizer": "A base model whose files hold no tokenizer.",
    "asset-pickled-weights": "A base model that only has pickled weights, which are never loaded.",
    "asset-remote-code": "A base model that wants to run code of its own.",
    "asset-gated": "A base model behind a licence that has to be accepted first.",
    "asset-damaged": "Model files that are incomplete or whose content does not match.",
    "asset-wrong-base": "An adapter on a base model that it was not trained on.",
    "asset-unsupported": "A model or an adapter kind that cannot be used this way.",
    "asset-tokenizer-bounds": "A tokenizer that takes too long to load or for a text, or could make far more of it.",
    "asset-upload": "An upload that the hub did not take: the name, the right to write, or the connection.",
    # runs
    "run-not-a-run": "A folder that is not a run folder, or has no trained model in it.",
    "run-foreign-files": "An output folder that holds files of something else.",
    "run-other-lock": "An output folder whose run was made from another config, data or base.",
    "run-in-use": "A run folder that another process is writing to.",
    "run-no-table": "The table a run was trained on is needed again, and was not a file, is gone, or has changed.",
    "run-not-writable": "A run folder that cannot be written to: read-only, not permitted, or its disk failed.",
    "run-no-space": "Not enough disk space for what the run will write.",
    "run-interrupted": "The run was ended by SIGINT or SIGTERM, after a checkpoint at its last finished step.",
    "run-damaged": "A checkpoint or record whose content does not match its manifest.",
    # training
    "training-not-finite": "A loss or gradient that is NaN or infinite; nothing was updated with it.",
    "training-spike": "A loss that jumps far above those before it, again after every rewind that is allowed.",
    "training-no-memory": "Out of memory.",
    "training-rank-lost": "Another process of a run on several ranks has ended.",
    # dependencies
    "dependency-missing": "An optional package is needed and not installed.",
    "dependency-failed": "A package that a run reports to, or lets answer, is installed and could not begin, or ended.",
}
