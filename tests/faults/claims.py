"""Requirements that tests of single parts hold: which tests they are, run and counted for the table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from cases import Row

ROOT = Path(__file__).parents[2]
EXAMPLES = {False: 60, True: 10_000}  # of each property, short and long


@dataclass(frozen=True)
class Claim:
    """A line of the table. ``tests``: file below tests/, and the names of tests in it; none: all of the file."""

    number: str
    what: str
    tests: tuple[tuple[str, tuple[str, ...]], ...]


CLAIMS = (
    Claim("2", "predictions that ended early: only missing rows are asked, a file is whole or not there",
          (("unit/tuned/test_bulk.py", ("test_after_an_end_only_missing_rows_are_asked",)),)),
    Claim("2", "half-written files, folders, checkpoints, caches of killed processes: never seen, removed by the next",
          (("unit/run/test_killed.py", ()), ("unit/assets/test_cache.py", ()))),
    Claim("6", "two gloo ranks, SIGTERM to the other alone or to both, in a step and in an evaluation: both end, saved",
          (("unit/parallel/test_ranks.py", (
              "test_a_signal_to_one_rank_ends_all_and_another_number_of_ranks_goes_on",
              "test_a_signal_while_rank_0_evaluates_ends_all_soon")),)),
    Claim("7", "two gloo ranks against one: the same samples, losses and weights within 1e-6",
          (("unit/parallel/test_ranks.py", (
              "test_two_ranks_give_what_one_gives", "test_all_ranks_take_a_leaner_plan_when_one_has_no_memory")),)),
    Claim("8", "gradients do not depend on how a batch is cut up",
          (("unit/model/decoder/test_executions.py", ("test_gradients_do_not_depend_on_the_execution",)),
           ("unit/train/test_parity.py", ("test_loss_and_gradients_equal_the_reference",)))),
    Claim("9", "rows that are cut or dropped are counted; nothing to learn is an error before the first step",
          (("unit/data/test_prepare.py", ()), ("unit/data/test_render.py", ("test_truncation", "test_too_long")))),
    Claim("11", "the end of an answer has a label, also where it is the padding",
          (("unit/data/test_render.py", ("test_pad_equal_to_eos_is_still_trained",)),)),
    Claim("12", "training and prediction write the same prompt ids, one BOS",
          (("unit/data/test_render.py", ("test_training_and_prediction_give_the_same_prompt", "test_one_bos",
                                         "test_a_chat_template_writes_its_own_bos",
                                         "test_every_answer_is_trained_from_the_history_of_prediction")),)),
    Claim("13", "an adapter with keys missing, or of another base, is refused; loaded, it changes the answers",
          (("unit/model/test_model.py", ("test_another_base_and_missing_weights_are_refused",
                                         "test_each_adapter_trains_comes_back_and_merges",
                                         "test_going_on_from_an_adapter_of_another_base_or_kind_is_refused")),)),
    Claim("14", "merged weights give what the adapter gives", (("unit/export/test_export.py", (
        "test_merged_equals_adapter_and_leaves_the_model_alone", "test_bf16_is_rounded_once")),)),
    Claim("16", "one fresh process, another and a third that goes on, other hash seeds: every sha256 the same",
          (("faults/test_processes.py", ("test_processes_that_inherit_nothing_give_the_same_bytes",)),)),
    Claim("17", "config, rows, tokenizer, base changed under a run: refused, with what changed",
          (("unit/cli/test_resume.py", ("test_what_was_changed_under_a_run_is_refused_by_name",)),
           ("unit/data/test_rowdiff.py", ()))),
    Claim("25", "a pickle thrown at every loader: 0 executed; the lint rule bites", (("unit/test_no_pickle.py", (
        "test_datasets", "test_values_in_memory_are_values", "test_bases", "test_a_gguf_file", "test_runs",
        "test_what_lies_in_the_cache", "test_an_adapter_of_elsewhere", "test_a_journal_of_predictions",
        "test_the_lint_rule_bites", "test_torch_load_is_called_with_weights_only")),)),
    Claim("26", "hostile auto_map, tokenizer class, pipeline, dataset script, config tags: 0 executed without the flag",
          (("unit/test_no_pickle.py", ("test_a_base_with_code_of_its_own", "test_the_callers_flag_alone_lets_code_run",
                                       "test_a_dataset_with_a_script", "test_configs")),)),
    Claim("27", "chat templates: the injection corpus, endless loops, memory: 0 escapes, killed, told",
          (("unit/assets/test_template_worker.py", ()), ("unit/assets/test_chat.py", ("test_refused",)))),
    Claim("28", "prompt templates: plain names only, literal braces usable",
          (("unit/data/test_render.py", ("test_refused_templates",)),
           ("faults/test_properties.py", ("test_prompt_templates_write_the_text_of_their_columns",
                                          "test_prompt_templates_with_anything_else_are_refused",
                                          "test_any_text_is_a_template_or_refused")))),
    Claim("32", "names and links that lead out, in mirrors, bases, saved datasets, uploads: 0 read or written outside",
          (("unit/run/test_mirror.py", ("test_paths_in_a_mirror_stay_inside_the_run",)),
           ("unit/run/test_inside.py", ()))),
    Claim("33", "addresses as dataset, base, adapter, mirror's record, in files: 0 connections",
          (("unit/test_no_connection.py", ()),)),
    Claim("33", "a hub that sends on to another host: no token goes there",
          (("unit/assets/test_hub.py", ("test_another_host_that_a_hub_sends_on_to_is_given_no_token",)),)),
    Claim("34", "YAML: aliases, depth, duplicates, merge keys, tags, scalars of 1.2; the largest within a second",
          (("unit/config/test_load.py", ("test_hostile_and_broken_yaml", "test_yaml_1_2_scalars",
                                         "test_the_largest_configs_take_less_than_a_second")),
           ("faults/test_properties.py", ("test_yaml",)))),
    Claim("35", "CSV and JSONL: NUL, BOM, encodings, ragged rows, NA, 007; any rows; masks",
          (("unit/data/test_sources.py", ()), ("faults/test_properties.py", ("test_rows", "test_masks")))),
    Claim("36", "bombs of Parquet, Arrow, workbooks, JSON, CSV, one in 2 GiB of address space: refused, with the limit",
          (("unit/data/test_sources.py", ("test_a_gigabyte_out_of_463_bytes_is_refused_in_little_memory",
                                          "test_a_workbook_with_a_value_in_a_far_corner_is_refused_by_its_cells")),
           ("unit/data/test_bombs.py", ()))),
    Claim("39", "tokens of environment and addresses, planted strings: 0 in rows, events, logs, files, tracebacks",
          (("unit/data/test_redact.py", ()), ("unit/test_secrets.py", ()),
           ("unit/run/test_mirror.py", ("test_what_its_address_is_entered_with_is_not_told",)),
           ("unit/cli/test_bad_input.py", ("test_a_fault_of_ours_is_said_as_one_and_shows_no_secret",)))),
    Claim("42", "bad input of every kind through the command line: code, place, fix, no traceback",
          (("unit/cli/test_bad_input.py", ()),)),
    Claim("-", "a network that breaks in the middle of a file", (("unit/assets/test_hub.py", (
        "test_a_network_that_breaks_in_the_middle_of_a_file", "test_a_mirror_that_is_down_is_no_traceback")),)),
    Claim("-", "metrics, checkpoints, hooks and faults of training, part by part",
          (("unit/train/test_faults.py", ()), ("unit/train/test_checkpoint.py", ()), ("unit/train/test_loop.py", ()))),
)  # fmt: skip


def rows(long: bool) -> list[Row]:
    """Run the tests of all claims in one process, and count them."""
    whole = {file for claim in CLAIMS for file, of in claim.tests if not of}
    wanted = [f"tests/{file}" for file in sorted(whole)]
    parts = [(file, name) for claim in CLAIMS for file, of in claim.tests for name in of if file not in whole]
    wanted += [f"tests/{file}::{name}" for file, name in parts]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *wanted]
        env = {**os.environ, "LUTHIER_EXAMPLES": str(EXAMPLES[long])}
        subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = list(ET.parse(report).iter("testcase"))
    out = []
    for claim in CLAIMS:
        row = Row(claim.number, claim.what)
        for file, of in claim.tests:
            place = "tests." + file.removesuffix(".py").replace("/", ".")
            for case in cases:
                name = str(case.get("name"))
                named = case.get("classname") == place and (not of or name.split("[")[0] in of)
                if named and case.find("skipped") is None:
                    row.count(case.find("failure") is None and case.find("error") is None, f"{file} {name}")
        if not row.asked:
            row.count(False, "none of its tests has run")
        if any(file.endswith("test_properties.py") for file, _ in claim.tests):
            row.notes.append(f"{EXAMPLES[long]:,} examples of each property")
        out.append(row)
    return out
