"""A chat template is a stranger's program: whatever it does, one error of ours, soon, that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upslope.data import sandbox
from upslope.data.template import ChatTemplate
from upslope.errors import DataError
from upslope.types import Message

SET = "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "the test of a loop": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "written text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "kept text": "{% set b = 'x' * 99999 %}{% set x %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
    "kept slices": SET.replace("'a'", "['x' * 9999999]").replace("STEP", "ns.s + [ns.s[0][1:]]"),
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "repetition of a list": "{{ (10 ** 10 * [0])|length }}",
    "repetition of much": "{{ ([['a'] * 99999] * 99999)|length }}",
    "doubling": SET.replace("STEP", "ns.s ~ ns.s"),
    "adding": SET.replace("STEP", "ns.s + ns.s"),
    "lists of lists": SET.replace("STEP", "[ns.s, ns.s]"),
    "objects of objects": SET.replace("STEP", "dict(a=ns.s, b=ns.s)"),
    "power": "{{ 9 ** 999999999 }}",
    "squares": SET.replace("'a'", "3").replace("STEP", "ns.s * ns.s"),
    "replace": "{{ ('a' * 999999).replace('', 'b' * 999999) }}",
    "filter replace": "{{ ('a' * 999999)|replace('a', 'b' * 999999) }}",
    "join": "{{ ('b' * 999999).join(range(99999)|map('string')) }}",
    "filter join": "{{ range(99999)|join('b' * 999999) }}",
    "indent": "{{ ('x\\n' * 99999)|indent(99999) }}",
    "JSON indent": "{{ [1]|tojson(indent=10 ** 9) }}",
    "JSON separators": "{{ (range(99999)|list)|tojson(separators=('b' * 99999, ':')) }}",
    "map": "{{ range(99999)|map('default', [1] * 99999)|list }}",
    "round": "{{ 1.5|round(10 ** 8) }}",
    "strip": "{{ ('a' * 999999).strip('b' * 999999 + 'a') }}",
    "filter trim": "{{ ('a' * 999999)|trim('b' * 999999 + 'a') }}",
    "rfind": "{{ ('a' * 999999).rfind('ab' + 'a' * 99999) }}",
}
REFUSED = {
    "{{ 1 // 0 }}": "by zero",
    "{{ 2.0 ** 10000 }}": "out of range",
    "{{ range(10 ** 9) }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}": "recursion",
    "{% if 1 %}" * 999 + "{% endif %}" * 999: "recursion",
    "{% for a in [1] %}" * 40 + "{% endfor %}" * 40: "too many statically nested blocks",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{{ none() }}": "not callable",
    "{{ 'a'|wordwrap(1) }}": "No filter named 'wordwrap'",
    "{{ 'a'.center(10 ** 9) }}": "unsafe",
    "{{ (5).to_bytes(10 ** 9, 'big') }}": "unsafe",
    "{{ 'a'.encode('punycode') }}": "unsafe",
    "{% macro g() %}{% set x = varargs %}{% endmacro %}{{ g(1) }}": "varargs of a macro are not available",
    "{{ '%1000000000d' % 1 }}": "a width without end",
    "{{ '%*d' % (10 ** 9, 1) }}": "a width without end",
    "{{ '{:>1000000000}'.format(1) }}": "a width without end",
    "{{ '{:>{}}'.format(1, 10 ** 9) }}": "a width without end",
    "{{ ('f' * 99999)|int(base=16) }}": "a number without end",
    "x" * 300_000: "more than the 250000 that are read",
    "{% include 'x' %}": "no loader",
    "{% if %}": "Expected an expression",
}


class Tokenizer:
    special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

    def __init__(self, source: str, path: str = "") -> None:
        self.chat_template, self.name_or_path = source, path

    def get_chat_template(self, tools: Any = None) -> str:
        return self.chat_template


def render(source: str, path: str = "") -> str:
    return ChatTemplate(Tokenizer(source, path)).render([Message("user", "hi")], add_generation_prompt=True).text


@pytest.mark.parametrize("what", ENDLESS)
def test_what_would_never_end_is_stopped_by_its_count(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By units, long before the clock: the same on every machine."""
    monkeypatch.setattr(sandbox, "UNITS", 2_000_000)
    with pytest.raises(DataError, match=r"refuses this conversation.*without end"):
        render(ENDLESS[what])


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source[:30])
def test_what_a_template_gets_wrong_is_one_error_of_ours(source: str) -> None:
    with pytest.raises(DataError, match="refuses this conversation") as caught:
        render(source)
    assert REFUSED[source] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    source = "{# one #}\n{% for m in messages %}\n{{ m.content }}\n{{ 1 // 0 }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    for text, line in ((source, 4), (source.replace("1 // 0", "1 +"), 4)):
        with pytest.raises(DataError, match=rf"\({tmp_path}/chat_template.jinja, line {line}\)"):
            render(text, str(tmp_path))


def test_the_clock_is_there_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    with sandbox.budget(seconds=-1), pytest.raises(DataError, match="without end"):
        render("{{ messages[0].content }}")


def test_what_templates_do_is_within_the_limits() -> None:
    """Two thousand long messages, each looked at several times, and what honest templates make of text and objects."""
    source = (
        "{% set ns = namespace(n=0, all=[]) %}{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.all = ns.all + [m] %}{{ '<' ~ m.role + '>' }}{{ m.content.split('</think>')[-1]|trim }}{% endfor %}"
        "{{ ns.n }} {{ [1, {'a': none}]|tojson(indent=2) }} {{ '%s %5d' % ('a', 7) }} {{ '{}: {{}}'.format('b') }} "
        "{{ ' ' * 4 }}{{ ['x', 'y']|join('-') }} {{ 'a b'.replace('a', 'c') }} {{ 2 ** 10 }} {{ messages[-1:]|length }}"
    )
    messages = [Message("assistant" if k % 2 else "user", f"hello {k} " * 200) for k in range(2000)]
    text = ChatTemplate(Tokenizer(source))._raw(messages, False)[0]
    assert text.startswith("<user>hello 0 hello 0")
    assert text.endswith('2000 [\n  1,\n  {\n    "a": null\n  }\n] a     7 b: {}     x-y c b 1024 1')
