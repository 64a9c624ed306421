"""Other trainers on the same work as train_speed.py and cpu_speed.py, each as the config says and at its best.

    python benchmarks/peers.py plain trl unsloth ludwig --folder /tmp/llama7b --out peers.csv    on a GPU, NF4 base
    python benchmarks/peers.py plain trl ludwig --cpu --folder PATH_OF_SMOLLM2                   on a CPU, bf16

`literal` is batch 1 with 16 accumulation steps, everything else as the trainer has it by default. The other settings
are those found to be fastest: the whole batch in one padded pass, no checkpointing, with Liger's kernels and without.
`literal` warms up for one step (16 passes) and is timed for `--steps`, the others warm up for 8 and are timed for six
times as many. Tokens are the real ones, padding left out, counted from what the model was given. Each trainer runs in a
process of its own; one that is not installed, or fails, is a row that says so. The folder needs a tokenizer for TRL,
Unsloth and Ludwig (`--tokenizer`). Ludwig (0.17 was tried) is run as the config says only, in an environment of its own
where what it needs differs from the others.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import percentiles, provenance

BATCH = 16
REAL = 10  # the smallest id of a sample; padding is below
R, TARGETS = 8, ["q_proj", "v_proj"]
COLUMNS = [
    "who", "setting", "tokens_per_s", "ms_per_step", "ms_p50", "ms_p90", "peak_gib", "commit", "versions", "error",
]  # fmt: skip
PACKAGES = {
    "plain": ("transformers", "peft", "bitsandbytes"),
    "trl": ("trl", "transformers", "peft", "liger-kernel"),
    "unsloth": ("unsloth", "trl", "transformers"),
    "ludwig": ("ludwig", "transformers", "peft", "bitsandbytes"),
}


@dataclass
class Job:
    """What all have in common. ``folder``: the base; ``steps``: timed optimizer steps of `literal`."""

    folder: Path
    tokenizer: Path
    steps: int
    cpu: bool

    def clock(self, setting: str) -> Clock:
        """A clock for that setting."""
        short = setting == "literal" or self.cpu
        return Clock(self.cpu, 1, self.steps + 1) if short else Clock(self.cpu, 8, 6 * self.steps + 8)

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """The samples, their prompts masked out of the labels."""
        from workload import samples

        chosen = samples(64, 104) if self.cpu else samples()
        return [
            {
                "input_ids": list(row.ids),
                "labels": [i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)],
                "attention_mask": [1] * row.length,
            }
            for row in chosen
        ]

    def base(self) -> Any:
        """The base as `quantization: {bits: 4}` has it; in bf16 on a CPU."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        if self.cpu:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(
            self.folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}
        )


@dataclass
class Clock:
    """Counts the tokens that a model is given and the seconds of the timed steps."""

    cpu: bool
    warm: int
    last: int
    step: int = 0
    began: float = 0.0
    seconds: float = 0.0
    passes: list[Any] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)

    def given(self, ids: Any) -> None:
        """A pass over these; they are counted at the end, so that nothing waits for the device."""
        if self.began and not self.seconds:
            self.passes.append(ids)

    def stepped(self) -> None:
        """An optimizer step is done; only the first and the last that are timed wait for the device."""
        import torch

        self.step += 1
        if not self.warm <= self.step <= self.last:
            return
        if self.step == self.warm:
            if not self.cpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        self.marks.append(time.perf_counter() if self.cpu else torch.cuda.Event(enable_timing=True))
        if not self.cpu:
            self.marks[-1].record()
        if self.step == self.last:
            if not self.cpu:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began

    def row(self, who: str, setting: str) -> dict[str, Any]:
        """The row of the table."""
        import torch

        tokens = sum(int((ids >= REAL).sum()) for ids in self.passes)
        pairs = itertools.pairwise(self.marks)
        each = [1000 * (after - before) if self.cpu else before.elapsed_time(after) for before, after in pairs]
        peak = torch.cuda.max_memory_allocated() if not self.cpu else resource.getrusage(0).ru_maxrss * 1024
        return {
            "who": who,
            "setting": setting,
            "tokens_per_s": round(tokens / self.seconds),
            "ms_per_step": round(1000 * self.seconds / (self.last - self.warm), 1),
            **percentiles(each),
            "peak_gib": round(peak / 2**30, 2),
        }


def plain(job: Job) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A loop over transformers, PEFT and bitsandbytes, as their documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    def run(setting: str, batch: int, checkpointing: bool) -> dict[str, Any]:
        model = job.base()
        if not job.cpu:
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        tuned = get_peft_model(model, LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGETS, task_type="CAUSAL_LM"))
        tuned.train()
        optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
        clock, rows, device = job.clock(setting), job.rows, next(tuned.parameters()).device
        for step in range(clock.last):
            chosen = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
            for first in range(0, BATCH, batch):
                inputs = {key: value.to(device) for key, value in padded(chosen[first : first + batch]).items()}
                clock.given(inputs["input_ids"])
                with torch.autocast(device.type, torch.bfloat16):
                    loss = tuned(**inputs, use_cache=False).loss
                (loss / (BATCH // batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.stepped()
        return clock.row("plain", setting)

    yield "literal", lambda: run("literal", 1, not job.cpu)
    if not job.cpu:
        yield "padded", lambda: run("padded", BATCH, False)


def trl(job: Job) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """TRL's SFTTrainer on tokens that are ready."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def run(setting: str, **given: Any) -> dict[str, Any]:
        trainer, clock = _trainer(SFTTrainer, job, setting)
        lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer(
            model=job.base(),
            args=SFTConfig(**_arguments(clock), use_cpu=job.cpu, **given),
            train_dataset=_dataset(job),
            processing_class=AutoTokenizer.from_pretrained(job.tokenizer),
            peft_config=lora,
        ).train()
        return clock.row("trl", setting)

    literal = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    whole = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    yield "literal", lambda: run("literal", **literal)
    if job.cpu:  # one padded pass of 16 is slower there
        yield "not checkpointed", lambda: run("not checkpointed", **literal, gradient_checkpointing=False)
    else:
        yield "padded", lambda: run("padded", **whole, gradient_checkpointing=False)
        yield (
            "padded, liger",
            lambda: run("padded, liger", **whole, gradient_checkpointing=False, use_liger_kernel=True),
        )


def unsloth(job: Job) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Unsloth's FastLanguageModel under the same trainer."""
    from unsloth import FastLanguageModel  # before trl, which it changes
    from trl import SFTConfig, SFTTrainer  # isort: skip

    import torch

    def run(setting: str, checkpointing: Any, **given: Any) -> dict[str, Any]:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(job.folder), max_seq_length=1024, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=R,
            lora_alpha=2 * R,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            random_state=0,
        )
        trainer, clock = _trainer(SFTTrainer, job, setting)
        trainer(
            model=model,
            args=SFTConfig(**_arguments(clock), dataset_num_proc=1, max_length=1024, **given),
            train_dataset=_dataset(job),
            processing_class=tokenizer,
        ).train()
        return clock.row("unsloth", setting)

    yield (
        "literal",
        lambda: run("literal", "unsloth", per_device_train_batch_size=1, gradient_accumulation_steps=BATCH),
    )
    yield "padded", lambda: run("padded", False, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1)


def ludwig(job: Job) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Ludwig's own trainer on text, which it takes: common words, a token each, as many as the samples have tokens."""
    import pandas
    import torch
    from ludwig.api import LudwigModel
    from ludwig.callbacks import Callback
    from seed_job import WORDS

    def run(setting: str) -> dict[str, Any]:
        clock, draw, rows = job.clock(setting), random.Random(1), job.rows

        class Timed(Callback):  # type: ignore[misc]
            def on_epoch_start(self, trainer: Any, *_: Any, **__: Any) -> None:  # adapted by then; there is one epoch
                trainer.model.model.register_forward_pre_hook(self.given, with_kwargs=True)

            def on_batch_end(self, *_: Any, sync_step: bool, **__: Any) -> None:
                if sync_step:
                    clock.stepped()

            @staticmethod
            def given(_: Any, __: Any, named: dict[str, Any]) -> None:
                # by the mask: it pads with the token that ends each answer, which is a real one there
                clock.given(torch.where(named["attention_mask"].bool(), REAL, 0))

        def words(count: int) -> str:
            return " ".join(draw.choice(WORDS) for _ in range(count))

        chosen = [rows[i % len(rows)] for i in range(clock.last * BATCH)]  # one epoch: it steps once more at an end
        prompts = [row["labels"].count(-100) for row in chosen]
        table = {
            "instruction": [words(count) for count in prompts],
            "output": [words(len(row["labels"]) - count) for row, count in zip(chosen, prompts, strict=True)],
        }
        config = {
            "model_type": "llm",
            "base_model": str(with_tokenizer(job)),
            "input_features": [{"name": "instruction", "type": "text", "preprocessing": {"max_sequence_length": 512}}],
            "output_features": [{"name": "output", "type": "text", "preprocessing": {"max_sequence_length": 512}}],
            "adapter": {"type": "lora", "r": R, "alpha": 2 * R, "dropout": 0.0, "target_modules": TARGETS},
            "trainer": {
                "type": "finetune",
                "epochs": 1,
                "batch_size": 1,
                "gradient_accumulation_steps": BATCH,
                "learning_rate": 1e-4,
                "optimizer": {"type": "adam"},
                "skip_all_evaluation": True,
            },
            **({} if job.cpu else {"quantization": {"bits": 4}}),
        }
        saved = ("model", "progress", "log", "processed_input", "training_description", "training_statistics")
        LudwigModel(config, backend="local", callbacks=[Timed()]).train(
            training_set=pandas.DataFrame(table),
            output_directory=tempfile.mkdtemp(),
            **{f"skip_save_{what}": True for what in saved},
        )
        return clock.row("ludwig", setting)

    literal = "literal, fp32" if job.cpu else "literal"  # it loads a base that is not quantised in fp32
    yield literal, lambda: run(literal)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The rows side by side, shorter ones padded on the right."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 2, "labels": -100, "attention_mask": 0}
    return {key: torch.tensor([row[key] + [fill[key]] * (width - len(row[key])) for row in rows]) for key in fill}


def with_tokenizer(job: Job) -> Path:
    """A folder that has both, for who takes one: the base's, or one of links."""
    if job.tokenizer == job.folder:
        return job.folder
    folder = Path(tempfile.mkdtemp())
    for path in (*job.folder.iterdir(), *job.tokenizer.iterdir()):
        link = folder / path.name
        if not link.exists():  # the base's config is there first
            link.symlink_to(path.resolve())
    return folder


def _arguments(clock: Clock) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": clock.last,
        "bf16": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "report_to": [],
        "logging_steps": 1000,
        "save_strategy": "no",
    }


def _dataset(job: Job) -> Any:
    from datasets import Dataset

    return Dataset.from_list(job.rows)


def _trainer(kind: Any, job: Job, setting: str) -> tuple[Any, Clock]:
    """The trainer with a clock in it."""
    from transformers import TrainerCallback

    clock = job.clock(setting)

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stepped()

    class Counting(kind):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given, callbacks=[Timed()])

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            clock.given(inputs["input_ids"])
            return super().training_step(model, inputs, *rest, **named)

    return Counting, clock


def one(who: str, job: Job, only: str | None) -> None:
    """All settings of one peer, a ROW line each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
    if job.cpu:  # TRL takes a GPU for granted where Triton is installed; from 1.15 on, wherever it trains
        sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        settings = list({"plain": plain, "trl": trl, "unsloth": unsloth, "ludwig": ludwig}[who](job))
    except ImportError as error:
        settings = []
        print("ROW " + json.dumps({"who": who, "error": f"not installed: {error}"}), flush=True)
    told = provenance("torch", *PACKAGES[who])
    for setting, run in settings:
        if only and setting != only:
            continue
        try:
            row = run()
        except Exception as error:  # a peer's failure is a result, and the next setting goes on
            row = {"who": who, "setting": setting, "error": repr(error)[:300]}
        print("ROW " + json.dumps(row | told), flush=True)
        _forget(job)


def _forget(job: Job) -> None:
    import torch

    gc.collect()
    if not job.cpu:
        torch.cuda.empty_cache()


def main() -> None:
    """Every peer that was named, each in its own process, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", nargs="+", choices=list(PACKAGES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json; the base's own by default")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", help="one setting")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        one(given.who[0], Job(given.folder, given.tokenizer or given.folder, given.steps, given.cpu), given.only)
        return
    rows = []
    for who in given.who:
        command = [sys.executable, __file__, who, "--here", *[word for word in sys.argv[1:] if word not in PACKAGES]]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
        rows += found or [{"who": who, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}]
        for row in found:
            print("RESULT", json.dumps(row), flush=True)
    for stream in (sys.stdout, *([given.out.open("w", newline="")] if given.out else [])):
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
