"""Hostile templates: each is refused or killed, with its place, and the next honest one still renders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from luthier.assets import template_worker
from luthier.assets.template_worker import START, Job, TemplateWorker, shared
from luthier.errors import DataError

HI = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
FOREVER = "{% for a in 'x' * 999999 %}{% for b in 'x' * 999999 %}{% endfor %}{% endfor %}"
GROWING = "{% set ns = namespace(x='a' * 9999) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__closure__ }}",
    "{{ range.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages|attr('%c%cclass%c%c'|format(95, 95, 95, 95)) }}",
    "{{ '{0.__class__.__mro__}'.format(messages).zzz.zzz }}",
    "{{ messages|map(attribute='__class__.__mro__')|list|first|attr('x') }}{{ undefined.x }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
]


@pytest.fixture
def worker() -> Iterator[TemplateWorker]:
    made = TemplateWorker(patience=1.0)
    yield made
    made.close()


def test_many_in_one_call(worker: TemplateWorker) -> None:
    jobs = [Job([*HI, {"role": "assistant", "content": f"{n} é \ud83c"}], [(1, True), (2, False)]) for n in range(300)]
    texts = worker.render(ECHO, jobs, {})
    assert texts[7] == ["[hi]>", "[hi][7 é \ud83c]"] and len(texts) == 300


@pytest.mark.parametrize("template", INJECTIONS)
def test_injection_reaches_nothing(template: str) -> None:
    """Refused with its place, or what it asks for does not exist there and is empty."""
    try:
        texts = shared().render(template, [Job(HI, [(1, True)], where="data row 3")], {})
    except DataError as error:
        assert error.code in ("data-chat", "data-template")
        assert error.code == "data-template" or error.faults[0].where == "data row 3"
    else:
        assert texts == [[""]]


@pytest.mark.skipif(sys.platform == "win32", reason="no memory limit there")
def test_memory_is_bounded(worker: TemplateWorker) -> None:
    with pytest.raises(DataError, match="exceeds its bounds"):
        worker.render(GROWING, [Job(HI, [(1, True)])], {})


def test_an_endless_loop_is_killed_and_its_row_named(worker: TemplateWorker) -> None:
    template = "{% if messages[0].content == 'bad' %}" + FOREVER + "{% endif %}x"
    jobs = [Job([{"role": "user", "content": c}], [(1, True)], where=f"row {c}") for c in ("a", "b", "bad", "d")]
    with pytest.raises(DataError, match="longer than 1 s") as caught:
        worker.render(template, jobs, {})
    assert caught.value.faults[0].where == "row bad"
    assert worker.render(ECHO, [Job(HI, [(1, True)])], {}) == [["[hi]>"]]  # a new child


def pid(worker: TemplateWorker) -> int:
    """The child's, which is started where it was not."""
    worker.check(ECHO, "here")
    assert worker._process is not None
    return worker._process.pid


timed = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no processor time there, the clock alone")


@timed
def test_the_one_that_is_shipped_gives_a_text_one_second_of_its_processor() -> None:
    """Not more where many follow: the first of 300 is the one without end."""
    before = psutil.Process(pid(shared())).cpu_times()
    reaped = os.times()
    jobs = [Job(HI, [(1, True)], where=f"row {n}") for n in range(300)]
    with pytest.raises(DataError, match="longer than 1 s") as caught:
        shared().render(FOREVER, jobs, {})
    now = os.times()
    used = now.children_user + now.children_system - reaped.children_user - reaped.children_system
    assert caught.value.faults[0].where == "row 0"
    assert 0.9 < used - before.user - before.system < 1.3
    assert shared().render(ECHO, [Job(HI, [(1, True)])], {}) == [["[hi]>"]]


@timed
def test_a_machine_that_is_loaded_refuses_no_template(worker: TemplateWorker) -> None:
    """A child that gets no processor for longer than its deadline has used none of it; a far wall is behind that."""
    child = pid(worker)
    os.kill(child, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (child, signal.SIGCONT)).start()
    assert worker.render(ECHO, [Job(HI, [(1, True)])], {}) == [["[hi]>"]]  # its deadline is 1 s
    assert pid(worker) == child


@timed
def test_a_child_that_stands_still_is_given_up_by_the_clock(
    worker: TemplateWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_worker, "LOADED", 0.3)
    os.kill(pid(worker), signal.SIGSTOP)
    with pytest.raises(DataError, match="longer than 1 s"):
        worker.render(ECHO, [Job(HI, [(1, True)])], {})


@timed
def test_many_texts_have_a_deadline_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "PATIENCE_EACH", 0.0)
    slow = "{% for a in 'x' * 200000 %}{% endfor %}"  # some hundredths of a second
    jobs = [Job(HI, [(1, True)], where=str(n)) for n in range(500)]
    made = TemplateWorker(patience=0.5)
    with pytest.raises(DataError, match="of many texts") as caught:
        made.render(slow, jobs, {})
    assert 0 < int(str(caught.value.faults[0].where)) < 499
    made.close()


def test_a_slow_start_is_not_counted_against_a_template(
    worker: TemplateWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.assets.template_worker.START", "import time; time.sleep(1.5); " + START)
    assert worker.render(ECHO, [Job(HI, [(1, True)])], {}) == [["[hi]>"]]  # its deadline is 1 s
    monkeypatch.setattr("luthier.assets.template_worker.START", "raise SystemExit")
    worker.close()
    with pytest.raises(DataError, match="its process ended"):
        worker.render(ECHO, [Job(HI, [(1, True)])], {})


def test_a_child_that_died_is_replaced(worker: TemplateWorker) -> None:
    worker.render(ECHO, [Job(HI, [(1, True)])], {})
    assert worker._process is not None
    first = worker._process.pid
    worker.render(ECHO, [Job(HI, [(1, True)])], {})
    assert worker._process.pid == first, "the child is kept between calls"
    worker._process.kill()
    worker._process.wait()
    assert worker.render(ECHO, [Job(HI, [(1, True)])], {}) == [["[hi]>"]]


def test_the_child_is_given_no_secrets(worker: TemplateWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker.check(ECHO, "here")
    assert worker._process is not None
    if os.path.exists(path := f"/proc/{worker._process.pid}/environ"):
        with open(path, "rb") as stream:
            assert b"secret" not in stream.read()


def test_a_malformed_template_is_told_with_its_line(worker: TemplateWorker) -> None:
    with pytest.raises(DataError, match="line 2") as caught:
        worker.check("a\n{% for %}", "prompt.chat_template")
    assert caught.value.code == "data-template"


def test_no_child_where_no_chat_template_is_used() -> None:
    code = (
        "from rendering_fixtures import byte_level, prompt_section\n"
        "from luthier.data.layout import Layout\n"
        "from luthier.data.render import Renderer\n"
        "from luthier.assets.template_worker import shared\n"
        "r = Renderer(Layout('completion', ('q',), 'y'), prompt_section(template='{q}'), byte_level())\n"
        "r.outcomes([(0, {'q': 'a', 'y': 'b'})]); r.prompt({'q': 'a'})\n"
        "assert shared()._process is None\n"
        "r = Renderer(Layout('completion', ('q',), 'y'), prompt_section(), byte_level())\n"
        "r.prompt({'q': 'a'}); assert shared()._process is not None\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
