"""report.json holds to its schema, and the page and the table show what it says."""

from __future__ import annotations

import io
import json
import re

import jsonschema
import msgspec
import pytest
from rich.console import Console

from loadtest.compare.page import page
from loadtest.compare.report import Arrival, Memory, read_report, schema, write_report
from loadtest.compare.table import remarks, show
from tests.loadtest.compare.made import report, run

POISSON = [Arrival("poisson", rate) for rate in (1.0, 2.0)]


def runs(slower: float = 0.05):
    return [
        run(label, pace + 0.001 * i, i, arrival)
        for label, pace in (("bf16", slower), ("<b>w4a16</b>", 0.01))
        for i in range(3)
        for arrival in POISSON
    ]


def test_a_report_is_read_as_it_was_written_and_keeps_its_schema(tmp_path):
    made = report(runs())
    write_report(made, tmp_path / "r.json")
    assert read_report(tmp_path / "r.json") == made
    content = json.loads((tmp_path / "r.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(content)
    content["runs"][0]["figures"]["output_per_second"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(content)


@pytest.mark.parametrize("change", [{"format": "other"}, {"surprise": 1}, {"sides": 3}])
def test_a_file_that_is_no_report_is_refused(tmp_path, change):
    write_report(report(runs()), file := tmp_path / "r.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="not a report of"):
        read_report(file)


def test_the_page_loads_nothing_and_escapes_what_it_shows():
    text = page(report(runs(), notes=("a <note>",)))
    assert "&lt;b&gt;w4a16&lt;/b&gt;" in text
    assert "<b>w4a16</b>" not in text.replace("<li><b>", "")
    assert "a &lt;note&gt;" in text
    fetched = re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', text)
    assert [each for each in fetched if "xlink" not in each] == []
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert "chat: throughput against interactivity" in titles
    assert "chat: time to first token" in titles
    assert "chat: goodput over offered requests/s" in titles
    assert "Memory" in titles
    assert text.count("<svg") == len(titles)


def test_the_table_says_who_is_better_and_what_was_wrong():
    stalled = run("bf16", 0.05, 9, POISSON[0], complaints=("client stalled: event-loop lag p99 90 ms",))
    console = Console(width=160, file=io.StringIO())
    show(report([*runs(), stalled]), console)
    text = console.file.getvalue()
    assert "output_per_second: <b>w4a16</b>" in text
    assert "1 of 13 runs invalid and left out" in text
    assert "against bf16" in text
    assert "better" in text
    assert "22.50 [21.00, 24.00]" in text


def test_what_a_server_does_not_tell_and_answers_cut_short_are_said():
    found = report([run("ours", 0.01), run("theirs", 0.01)])
    theirs = msgspec.structs.replace(found.sides[1], kernels=[], memory=Memory(96_000_000, rss_bytes=1))
    short = msgspec.structs.replace(
        found.runs[1], figures=msgspec.structs.replace(found.runs[1].figures, short_answers=3)
    )
    said = remarks(msgspec.structs.replace(found, sides=[found.sides[0], theirs], runs=[found.runs[0], short]))
    assert "theirs does not tell: kernels, KV tokens, KV bytes" in said
    assert any(line.startswith("theirs ended 3 of 4 answers before the length asked for") for line in said)
    assert not any(line.startswith("ours") for line in said)
