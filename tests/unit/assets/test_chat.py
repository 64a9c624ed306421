from __future__ import annotations

import pytest

from luthier.assets import chat, sandbox
from luthier.assets.chat import check_template, render_chat
from luthier.errors import DataError

HI = [{"role": "user", "content": "hi"}]


def test_blocks_are_trimmed_and_json_is_plain() -> None:
    template = "{% for m in messages %}\n  {% if true %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}"
    assert render_chat(template, [{"role": "user", "content": "<ü>"}]) == '{"role": "user", "content": "<ü>"}\n'


def test_equal_to_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{{ bos_token }}{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n{% if m.role == 'system' %}"
        "{% continue %}{% endif %}\n  {%- set ns.n = ns.n + 1 %}{{ ns.n }}{% generation %}{{ m.content|trim }}"
        "{% endgeneration %}\n{% endfor %}\n{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " hi "}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    theirs = render_jinja_template([messages], tools=tools, chat_template=template, bos_token="<s>")[0][0]
    assert render_chat(template, messages, tools=tools, bos_token="<s>") == theirs


def test_the_day_does_not_change() -> None:
    assert render_chat("{{ strftime_now('%d %b %Y') }}", HI) == "26 Jul 2024"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 9999999 }}",
        "{{ 'x'.ljust(100000000) }}",
        "{{ '%0999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[7].content }}",
    ],
)
def test_refused(template: str) -> None:
    with pytest.raises(DataError) as caught:
        render_chat(template, HI, where="data row 3")
    assert caught.value.code == "data-chat"
    assert "data row 3" in str(caught.value)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_OUTPUT", 1000)
    with pytest.raises(DataError, match="more than"):
        render_chat("{% for i in range(500) %}xxxx{% endfor %}", HI)
    assert sandbox.MAX_STEPS > 500


@pytest.mark.parametrize("template", ["{% for %}", "x" * (chat.MAX_TEMPLATE + 1), "{{ x | nonesuch }}"])
def test_malformed(template: str) -> None:
    with pytest.raises(DataError) as caught:
        check_template(template)
    assert caught.value.code == "data-template"
