"""Comparison, few-shot prompts, charts and the report page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from luthier.evaluate import Comparison, compare, few_shot, write_report
from luthier.evaluate.charts import line_chart, short, ticks
from luthier.evaluate.few_shot import pick
from luthier.types import Machine

ROWS = [10, 11, 12, 13]
REFERENCES = ["a", "b", "c", "d"]
ANSWERS = {"base": ["a", "x", "x", "x"], "base 3-shot": ["a", "b", "x", "x"], "tuned": ["y", "b", "c", "x"]}


def make(**more):
    return compare(ROWS, REFERENCES, ANSWERS, ["exact_match"], **more)


def test_scores_and_flips():
    got = make()
    assert [c.scores["exact_match"] for c in got.contestants] == [0.25, 0.5, 0.5]
    assert [(f.against, f.gained, f.lost) for f in got.flips] == [
        ("base", (11, 12), (10,)),
        ("base 3-shot", (12,), (10,)),
    ]


def test_samples_always_show_losses_and_failures():
    count = 40
    base = ["no"] * count
    base[30] = "yes"
    tuned = ["yes"] * count
    tuned[30] = tuned[35] = "no"
    got = compare(range(count), ["yes"] * count, {"base": base, "tuned": tuned}, ["exact_match"], samples=8)
    shown = [s.row for s in got.samples]
    assert len(shown) == 8
    assert {30, 35} <= set(shown)
    assert shown == sorted(shown)


def test_classes_and_json_round_trip():
    got = compare(
        [0, 1, 2],
        ["yes", "no", "no"],
        {"base": ["no", "no", "no"], "tuned": ["Yes", "no", "no"]},
        classes=["yes", "no"],
        prompts=["p", "q", "r"],
    )
    assert got.metrics == ("accuracy", "macro_f1")
    assert got.contestants[1].scores["macro_f1"] == 1.0
    assert got.contestants[0].classes["yes"]["f1"] == 0.0
    assert Comparison.from_json(json.loads(json.dumps(got.to_json()))) == got


@pytest.mark.parametrize("answers", [{}, {"tuned": ["a"]}])
def test_lists_that_do_not_fit_are_refused(answers):
    with pytest.raises(ValueError, match="one answer a row"):
        compare(ROWS, REFERENCES, answers)


def test_few_shot_shows_solved_examples_of_different_answers():
    examples = [(f"Q{i}: ", "spam" if i < 20 else "ham") for i in range(22)]
    text = few_shot(examples, "Q99: ", shots=2, seed=1)
    assert text.endswith("\n\nQ99: ")
    assert "spam" in text
    assert "ham" in text
    assert few_shot(examples, "Q98: ", shots=2, seed=1)[:-5] == text[:-5]
    assert len(pick(examples, 50, 0)) == 22
    assert few_shot(examples, "Q", shots=0) == "Q"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3.7), (2.1, 2.2), (5, 5), (0, 0), (-3, 1e6), (1e-7, 2e-4)])
def test_ticks_are_round_and_cover(low, high):
    got = ticks(low, high)
    assert got[0] <= low + 1e-12
    assert got[-1] >= high - 1e-12
    assert 2 <= len(got) <= 12


def test_short_numbers():
    assert [short(v) for v in (0, 0.25, 1e-4, 2.5e-5, 3, 1200)] == ["0", "0.25", "1e-4", "2.5e-5", "3", "1200"]


def test_chart_is_valid_xml_and_skips_what_is_not_finite():
    chart = line_chart(
        {"training": [(1, 3.0), (2, float("nan")), (3, 1.0)], "<b>": [(3, 2.0)]},
        x_label="step",
        y_label="loss",
        title="t",
    )
    svg, _, legend = str(chart).partition("</svg>")
    root = ET.fromstring(svg + "</svg>")
    lines = [e for e in root.iter() if e.tag == "polyline"]
    assert [len(e.attrib["points"].split()) for e in lines] == [2]
    assert "<b>" not in legend
    assert line_chart({"x": [(1, float("inf"))]}, x_label="", y_label="", title="") == ""


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make_report(folder):
    lines = [
        {"step": s, "epoch": s / 60, "split": "train", "loss": 3 / s**0.5 + 0.2, "learning_rate": 2e-4 * (1 - s / 60)}
        | {"tokens_per_s": 900.0 + s}
        for s in range(1, 61)
    ]
    lines += [{"step": s, "epoch": s / 60, "split": "validation", "loss": 3 / s**0.5 + 0.3} for s in (20, 40, 60)]
    comparison = make(prompts=["<script>alert(1)</script>", "東京は?", "p", "q"])
    return write_report(
        folder,
        config={"base_model": "smollm2", "trainer": {"learning_rate": 2e-4, "betas": [0.9, 0.999]}, "adapter": None},
        audit={"rows": {"train": 540, "validation": 60}, "dropped": {"no target": [3, 7]}},
        metrics_lines=lines,
        comparison=comparison,
        machine=Machine(cores=2, memory=8 << 30, free_memory=4 << 30),
        versions={"torch": "2.13.0"},
    )


def test_the_report_is_whole_escaped_and_self_contained(tmp_path):
    text = make_report(tmp_path).read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert "&lt;script&gt;alert(1)" in text
    for fact in ("東京は?", "trainer.learning_rate", "2e-4", "base 3-shot", "50.0 %", "540", "2.13.0", "2 rows gained"):
        assert fact in text, fact


def test_a_report_without_anything_but_samples(tmp_path):
    path = write_report(
        tmp_path, config={}, samples=[{"prompt": "p", "answer": "new", "reference": "r", "before": "old"}]
    )
    text = path.read_text("utf-8")
    assert "old" in text
    assert text.index("old") < text.index("new")
    assert "<svg" not in text
