"""What a person reads while a run works, without a terminal and with one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from luthier import console, events


class Clock:
    """A time that tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def step(number: int, **values: float) -> events.Stepped:
    return events.Stepped(step=number, total_steps=100, epoch=0.1, split="train", loss=1.0, values=values)


@pytest.mark.parametrize("stage", ["fetch", "convert", "tokenise", "evaluate", "generate"])
def test_every_long_piece_shows_progress_with_time_left(stage: str, clock: Clock) -> None:
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    log(events.Stage(name=stage, detail="something"))
    log(events.Progress(stage=stage, completed=0, total=200, unit="rows"))
    clock.now += 20
    log(events.Progress(stage=stage, completed=50, total=200, unit="rows"))
    assert lines == [f"{stage}: something", f"{stage}: 50/200 rows, 1m00s left"]


def test_progress_without_an_announcement_has_a_time_left_too(clock: Clock) -> None:
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    log(events.Progress(stage="evaluate", completed=0, total=4, unit="passes"))
    clock.now += 10
    log(events.Progress(stage="evaluate", completed=1, total=4, unit="passes"))
    assert lines == ["evaluate: 1/4 passes, 30s left"]


def test_the_first_of_many_says_nothing_of_the_pace(clock: Clock) -> None:
    """Answers of one batch end together: after the first of eighty, twelve minutes would be told of half a minute."""
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    for completed in (0, 1, 30):
        log(events.Progress(stage="generate", completed=completed, total=80, unit="rows"))
        clock.now += 10
    assert lines == ["generate: 1/80 rows", "generate: 30/80 rows, 33s left"]


def test_training_tells_of_itself_by_its_steps(clock: Clock) -> None:
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    log(events.Stage(name="train", detail="100 steps"))
    log(events.Progress(stage="train", completed=0, total=100, unit="steps"))
    clock.now += 30
    log(events.Progress(stage="train", completed=10, total=100, unit="steps"))
    log(step(10, tokens_per_s=4321.0, learning_rate=1e-4, memory_gib=2.5))
    assert lines[1:] == ["step 10/100  train loss 1.0000  lr 1.00e-04  tok/s 4,321  GiB 2.50, 4m30s left"]


def test_the_time_left_of_a_resumed_run_counts_from_where_it_went_on(clock: Clock) -> None:
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    log(events.Stage(name="train", detail=""))
    log(events.Progress(stage="train", completed=80, total=100, unit="steps"))
    clock.now += 60
    log(step(90))
    assert lines[-1].endswith(", 1m00s left")  # ten steps took a minute, ten are left


def test_a_terminal_gets_bars_with_the_time_left() -> None:
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, width=200)
    live = console.LiveLog(screen)
    with live.progress:
        live(events.Stage(name="tokenise", detail="300 rows"))
        live(events.Progress(stage="tokenise", completed=150, total=300, unit="rows"))
        live(step(10, tokens_per_s=50.0))
        live(events.Note(text="3 rows dropped"))
        live.progress.refresh()
        live(events.Stage(name="tokenise", detail="", done=True, seconds=0.1))
    text = out.getvalue()
    assert "150/300" in text and "left" in text and "3 rows dropped" in text and "tok/s 50" in text


def test_a_rambling_answer_does_not_push_the_others_off_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = {
        "count": 1,
        "contestants": [{"name": name, "scores": {"exact_match": 0.0}} for name in ("base", "tuned")],
        "flips": [{"against": "base", "gained": [0], "lost": []}],
        "samples": [{"row": 0, "prompt": "p" * 400, "reference": "y", "answers": {"base": "#\n" * 200, "tuned": "y"}}],
    }
    console.show_comparison(comparison, samples=1)
    out = capsys.readouterr().out
    prompt = [line for line in out.splitlines() if "ppp" in line]
    assert max(map(len, prompt)) > max(len(line) for line in out.splitlines() if "┃" in line), "as wide as the screen"
    assert out.count("#") == 4 and "(400 characters)" in out and "1 rows gained, 0 lost" in out


def test_markup_in_data_stays_text(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(console.table("[red]t", ["[bold]c"], [["[link=x]v"]]))
    assert "[link=x]v" in capsys.readouterr().out
