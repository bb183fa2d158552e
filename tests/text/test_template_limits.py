"""Templates that loop, or make much of little: each ends soon, with a 400. And what the limits leave as it was."""

from __future__ import annotations

import resource
import time

import pytest

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError
from nvfp4_runtime.text import template_limits
from nvfp4_runtime.text.chat_template import ChatTemplate

HI = [{"role": "user", "content": "Hi"}]
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}%s"


def render(source: str) -> str:
    return ChatTemplate(source).render(HI)


ENDLESS = {
    "loops that write nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop in a loop by recursion": (
        "{% for x in [1] * 50 recursive %}{{ loop([1] * 50) if loop.depth < 9 }}{% endfor %}"
    ),
    "a caller that loops": (
        "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call m() %}{% for i in range(99999) %}{% endfor %}{% endcall %}"
    ),
}
EXPLOSIVE = {
    "text times a number": "{{ 'a' * 10**9 }}",
    "a number times text": "{{ 10**9 * messages[0].content }}",
    "text of text": "{{ ('a' * 9000000) ~ ('a' * 9000000) }}",
    "doubling by +": GROW % ("'ab'", "ns.x + ns.x", ""),
    "doubling by ~": GROW % ("'ab'", "ns.x ~ ns.x", ""),
    "doubling a list": GROW % ("['ab']", "ns.x + ns.x", ""),
    "doubling by capture": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}"
    ),
    "lists of one list, written": GROW % ("['ab']", "[ns.x, ns.x]", "{{ ns.x }}"),
    "lists of one list, as JSON": GROW % ("['ab']", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    "lists of one list, joined": GROW % ("['ab']", "[ns.x, ns.x]", "{{ ns.x | join }}"),
    "squares of squares": GROW % ("10", "ns.x * ns.x", ""),
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a width": "{{ 'x'.ljust(10**9) }}",
    "a width of a filter": "{{ 'x' | center(10**9) }}",
    "a width in a % format": "{{ '%1000000000d' % 1 }}",
    "a width in a format": "{{ '{:>1000000000}'.format(1) }}",
    "a width given to a format": "{{ '{:>{}}'.format(1, 10**9) }}",
    "a width in the filter format": "{{ '%1000000000d' | format(1) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "every letter replaced": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "every letter replaced by a filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "a long separator": "{{ (['a'] * 1000) | join('x' * 1000000) }}",
    "a long separator's method": "{{ ('x' * 1000000).join(['a'] * 1000) }}",
    "translation": "{{ 'a'.translate({97: 'x'}) }}",
    "a long range": "{{ range(10**9) | list }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_without_end_are_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_RENDER_SECONDS", 0.1)
    started = time.thread_time()
    with pytest.raises(InvalidParameterError, match=r"took longer than 0\.1 seconds|recursion"):
        render(source)
    assert time.thread_time() - started < 1.0


def test_turns_are_bounded_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_TURNS", 1000)
    assert render("{% for i in range(999) %}{% endfor %}x") == "x"
    with pytest.raises(InvalidParameterError, match="took longer"):
        render("{% for i in range(1100) %}{% endfor %}x")


@pytest.mark.parametrize("source", EXPLOSIVE.values(), ids=EXPLOSIVE)
def test_operations_that_make_much_of_little_are_refused(source: str) -> None:
    started, memory = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidParameterError):
        render(source)
    assert time.thread_time() - started < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10, "KiB"


@pytest.mark.parametrize("name", ["wordwrap", "urlize", "striptags", "pprint"])
def test_filters_that_take_minutes_are_not_there(name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match="No filter named"):
        ChatTemplate(f"{{{{ 'x' | {name} }}}}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 1 + 2 * 3 ** 2 % 5 }}{{ [1] + [2] }}{{ 'a' + 'b' ~ 1 ~ none }}", "4[1, 2]ab1None"),
        ("{{ missing }}{{ none }}{{ true }}{{ 1.5 }}{{ {'a': [1]} }}", "NoneTrue1.5{'a': [1]}"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '/') }}{{ ['a', 'b'] | join(', ') }}", "a+ba/ba, b"),
        ("{{ '%s is %03d' % ('x', 7) }}{{ '{:>5}'.format('x') }}{{ 'a\nb' | indent(2) }}", "x is 007    xa\n  b"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(f(1)) }}{% set y %}{{ f(2) }}{% endset %}{{ y }}", "<<1>><2>"),
        ("{% for a, b in {'k': 1}.items() %}{{ a }}{{ b }}{{ loop.last }}{% else %}no{% endfor %}", "k1True"),
        ("{% for i in [] %}x{% else %}none{% endfor %}{{ messages | map(attribute='role') | list }}", "none['user']"),
    ],
)  # fmt: skip
def test_what_templates_do_is_left_as_it_was(source: str, text: str) -> None:
    assert render(source) == text


def test_a_conversation_of_many_turns_fits_the_limits() -> None:
    turns = [{"role": "user", "content": "word " * 20}] * 50_000
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content | trim }}{% endfor %}"
    assert len(ChatTemplate(source).render(turns)) == 50_000 * (8 + 99)
