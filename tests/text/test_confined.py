"""Templates that requests bring: in a process of their own, which ends with them if it must."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError
from nvfp4_runtime.text import confined
from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.confined import CONFINEMENT, ConfinedTemplate

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True, scope="module")
def end() -> Iterator[None]:
    yield
    CONFINEMENT.close()


def pid() -> int:
    process = CONFINEMENT._process
    assert process is not None
    return process.pid


def test_it_renders_as_a_checkpoints_template_does() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ mood }}{% endfor %}{{ tools | tojson }}"
    ours, theirs = ConfinedTemplate(source, {"bos_token": "<s>"}), ChatTemplate(source, {"bos_token": "<s>"})
    assert ours.variables == theirs.variables
    assert ours.extra_variables == {"mood"}
    options = {"tools": [{"n": 2**70, "s": "\ud800é"}], "variables": {"mood": "!"}}
    assert ours.render(HI, **options) == theirs.render(HI, **options)  # type: ignore[arg-type]


def test_refusals_name_the_template_or_the_messages() -> None:
    with pytest.raises(UnsupportedFormatError, match="does not compile"):
        ConfinedTemplate("{% for %}", {})
    with pytest.raises(InvalidParameterError, match="no system role") as caught:
        ConfinedTemplate("{{ raise_exception('no system role') }}", {}).render(HI)
    assert caught.value.param == "messages"


def test_what_gets_past_every_other_limit_ends_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "RENDER_SECONDS", 0.5)
    sleeper = ConfinedTemplate("{{ messages | sort(attribute='content') | length }}", {})
    before = pid()
    # a comparison of lists of one list, many times over, is one operation that takes for ever
    source = (
        "{% set a = namespace(x=[0]) %}{% set b = namespace(x=[0]) %}{% for i in range(40) %}"
        "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}"
    )
    endless = ConfinedTemplate(source, {})
    started = time.monotonic()
    with pytest.raises(InvalidParameterError, match=r"longer than 0\.5 seconds") as caught:
        endless.render(HI)
    assert caught.value.param == "chat_template"
    assert time.monotonic() - started < 5
    assert sleeper.render(HI) == "1", "another process has taken its place"
    assert pid() != before


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "RENDER_SECONDS", 60.0)  # not the clock's doing, on a busy machine
    source = (
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, 'a' * 99999 ~ i] %}{% endfor %}"
    )
    with pytest.raises(InvalidParameterError, match=r"cannot render these messages|more memory"):
        ConfinedTemplate(source, {}).render(HI)
    assert ConfinedTemplate("{{ messages[0].content }}", {}).render(HI) == "Hi"


def test_a_runaway_template_ends_even_when_the_server_is_gone() -> None:
    limits = "import resource; from nvfp4_runtime.text import confined; confined._limit_time(); "
    endless = "print('begun', flush=True)\nwhile True: pass"
    code = (
        limits + "resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY)) if SHORT else None; " + endless
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SHORT", "resource.getrlimit(resource.RLIMIT_CPU)[0] < 9")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGXCPU
    assert done.stdout == b"begun\n"


def test_it_renders_while_more_files_are_open_than_select_takes(many_open_files: None) -> None:
    CONFINEMENT.close()  # the next process's pipes are behind those files
    assert ConfinedTemplate("{{ messages | length }}", {}).render([]) == "0"
