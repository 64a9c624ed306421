"""Hostile templates: each is refused or killed, with its place, and the next honest one still renders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

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
        "from luthier.data.columns import Layout\n"
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
