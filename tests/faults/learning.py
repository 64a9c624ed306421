"""What a run must learn alike, however it is cut up; and that the end of an answer is learned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import children
from cases import ALIKE, NO_DROPOUT, Bench, Row

from luthier.run import read_metrics

OVERFIT = 400  # steps


def micro_batches(bench: Bench, rounds: int) -> list[Row]:
    """One effective batch of eight rows of unequal lengths as 8, 4, 2 and 1 a pass: the same samples and losses."""
    row = Row("7, 8", "micro-batches of 8, 4, 2, 1 of an effective batch of 8 unequal rows: samples, losses to 1e-6")
    worst, seen = 0.0, []
    for _ in range(rounds):
        found = []
        for size in (8, 4, 2, 1):
            run = bench.fresh()
            code, said = bench.train(
                run, "--set", f"trainer.batch_size={size}", "--set", f"trainer.gradient_accumulation_steps={8 // size}",
                *NO_DROPOUT, "--set", f"execution.tokens_per_pass={44 * size}",
            )  # fmt: skip
            lines = [one for one in read_metrics(bench.root / run / "metrics.jsonl") if one["split"] == "train"]
            taken = bench.rows_taken() if code == 0 else {}
            found.append((taken, [one["loss"] for one in lines], max(one["passes"] for one in lines)))
            assert code == 0, said[-1000:]
        samples, losses, _ = found[0]
        for taken, other, passes in found[1:]:
            gap = max(abs(a - b) / abs(a) for a, b in zip(losses, other, strict=True))
            worst = max(worst, gap)
            row.count(taken == samples and gap <= ALIKE and passes > found[0][2], f"{passes} passes: gap {gap:.1e}")
        seen = [passes for *_, passes in found]
    row.notes.append(f"{', '.join(map(str, seen))} passes a step; largest relative difference of a loss {worst:.1e}")
    return [row]


def ends(bench: Bench, rounds: int) -> list[Row]:
    """A model whose padding is its end token, overfitted on 20 rows: each answer is the row's, and stops by itself.

    So many steps because the random model first answers every row alike: its loss stays at that of guessing one of five
    answers (0.27 a token) for about 150 steps, as the same model does in a plain loop of transformers.
    """
    row = Row("11", f"pad == eos, 20 rows seen {OVERFIT} times: each answered word for word, and ended by itself")
    place = bench.root / "ends"
    for _ in range(rounds):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(bench.base, place / "base")
        settings = place / "base" / "tokenizer_config.json"
        named = json.loads(settings.read_text())
        settings.write_text(json.dumps({**named, "pad_token": named["eos_token"]}), encoding="utf-8")
        lines = [f"say {i},yes {i % 5}" for i in range(20)]
        (place / "rows.csv").write_text("\n".join(["question,answer", *lines]), encoding="utf-8")
        trainer = {
            "train_steps": OVERFIT, "batch_size": 20, "learning_rate": 0.01, "precision": "fp32", "early_stop": -1,
            "learning_rate_scheduler": {"decay": "linear"},
        }  # fmt: skip
        config = {
            "base_model": "base", "dataset": "rows.csv", "prompt": {"template": "{question}\n"}, "adapter": None,
            "preprocessing": {"split": {"probabilities": [1.0, 0.0, 0.0]}}, "generation": {"max_new_tokens": 24},
            "trainer": trainer, "execution": {"model": bench.engine, "device": "cpu"},
        }  # fmt: skip
        (place / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        first = children.start(place, "config.yaml", "--output", "run")
        assert first.wait() == 0, first.output()[-2000:]
        asked = children.start(
            place, "run", "--dataset", "rows.csv", "--output", "answers.jsonl", command="predict"
        )  # fmt: skip
        assert asked.wait() == 0, asked.output()[-2000:]
        answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
        missing = set(range(20)) - {one["row"] for one in answers}
        if missing or len(answers) != 20:
            row.count(False, f"{len(answers)} answers; none to {sorted(missing)}")
        for one in answers:
            right = one["finish_reason"] == "stop" and one["response"] == f"yes {one['row'] % 5}"
            row.count(right, f"row {one['row']}: {one['finish_reason']} {one['response']!r}")
    return [row]


CASES: dict[str, Callable[[Bench, int], list[Row]]] = {"micro-batches": micro_batches, "ends": ends}
SHORT = {"micro-batches": 1, "ends": 1}
LONG = {"micro-batches": 1, "ends": 1}
