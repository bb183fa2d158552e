"""What `nvfp4 top` computes from two scrapes, and how it says what it cannot read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from nvfp4_runtime.errors import ConfigError
from server.cli import main
from server.commands import top
from server.top import figures
from server.top.scrape import Change, Scrape, ScrapeError, Server

BEFORE = """\
# TYPE x_total counter
x_total{a="1"} 10
x_total{a="2"} 5
# TYPE s_seconds histogram
s_seconds_bucket{le="0.1"} 4
s_seconds_bucket{le="1.0"} 4
s_seconds_bucket{le="+Inf"} 4
s_seconds_count 4
s_seconds_sum 1
"""
AFTER = """\
# TYPE x_total counter
x_total{a="1"} 30
x_total{a="2"} 5
# TYPE s_seconds histogram
s_seconds_bucket{le="0.1"} 6
s_seconds_bucket{le="1.0"} 12
s_seconds_bucket{le="+Inf"} 14
s_seconds_count 14
s_seconds_sum 9
"""


def change(before: str = BEFORE, after: str = AFTER) -> Change:
    return Change(Scrape.parse(before, 100.0), Scrape.parse(after, 104.0))


def test_rates_are_of_the_time_between_and_sum_over_labels() -> None:
    assert change().rate("x_total") == 5
    assert change().rate("x_total", a="2") == 0
    assert change().rate("y_total") == 0
    assert change().after.by("x_total", "a") == {"1": 30, "2": 5}


def test_a_counter_that_fell_was_reset() -> None:
    assert change(AFTER, BEFORE).count("x_total") == 15


@pytest.mark.parametrize(
    ("q", "expected"), [(0.1, 0.05), (0.2, 0.1), (0.5, 0.1 + 0.9 * 3 / 6), (0.8, 1.0), (0.99, 1.0)]
)
def test_percentiles_are_of_the_new_observations_alone(q: float, expected: float) -> None:
    assert change().percentile("s_seconds", q) == pytest.approx(expected)


def test_without_new_observations_there_is_no_percentile() -> None:
    assert change(AFTER, AFTER).percentile("s_seconds", 0.5) is None
    assert change().percentile("t_seconds", 0.5) is None


def test_what_a_histogram_cannot_tell_apart_is_shown_as_a_bound() -> None:
    text = AFTER.replace("s_seconds", "vllm:request_queue_time_seconds").replace("x_total", "y_total")
    empty = Scrape.parse("", 100.0)
    lines = figures.latency_lines(Change(empty, Scrape.parse(text, 101.0)))
    (queue,) = (line for line in lines if line.startswith("queue"))
    assert queue.split() == ["queue", "250.0", "ms", "1.00", "s", "1.00", "s"]
    fast = text.replace("} 12", "} 6").replace("} 14", "} 6")
    (queue,) = (line for line in figures.latency_lines(Change(empty, Scrape.parse(fast, 101.0))) if "queue" in line)
    assert queue.split() == ["queue", "<100.0", "ms", "<100.0", "ms", "<100.0", "ms"]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0 ms"), (5e-5, "50 us"), (0.0123, "12.3 ms"), (2.5, "2.50 s")])
def test_durations_have_a_fitting_unit(value: float, text: str) -> None:
    assert figures.seconds(value) == text


def test_nobody_there_is_said_with_the_address() -> None:
    with pytest.raises(ScrapeError, match=r"http://127\.0\.0\.1:9/metrics: .*refused"):
        Server("http://127.0.0.1:9/").scrape()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_what_is_no_url_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", url]) == 1
    assert "expected a URL" in capsys.readouterr().err


def test_an_interval_or_key_file_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--interval", "0"]) == 1
    assert "--interval" in capsys.readouterr().err
    (tmp_path / "key").write_text("\n")
    assert main(["top", "--api-key-file", str(tmp_path / "key")]) == 1
    assert "no key in its first line" in capsys.readouterr().err


def test_without_textual_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual.app", None)
    args = argparse.Namespace(url="http://127.0.0.1:9", interval=1.0, api_key_file=None)
    with pytest.raises(ConfigError, match=r"pip install 'nvfp4-runtime\[top\]'"):
        top.run(args)
