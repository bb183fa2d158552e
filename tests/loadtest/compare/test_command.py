"""The whole course of a comparison, on simulated engines; and what is refused before anything starts."""

from __future__ import annotations

import json
import sys

import pytest

from loadtest.__main__ import main
from loadtest.compare.command import REPOSITORY
from loadtest.compare.report import Memory, read_report
from loadtest.server_process import running
from loadtest.traffic.traces import SAMPLES
from tests.loadtest.compare.test_external import VLLM

ENGINE = "--simulate --simulate-script 'Some words. ' --simulate-step-seconds"


def test_two_engines_and_a_file_are_compared(tmp_path, capsys):
    (tmp_path / "peer.json").write_text(json.dumps(VLLM))
    code = main(
        [
            "compare", "--model", f"fast={ENGINE} 0.002", "--model", f"slow={ENGINE} 0.05", "--concurrency", "2",
            "--seconds", "0.5", "--per-user", "1", "--workload", "200/300", "--passes", "1",
            "--import", f"peer={tmp_path / 'peer.json'}", "--output", str(tmp_path / "out"),
            "--trace", str(SAMPLES / "burstgpt.csv"), "--speedup", "20", "--scale", "0.02",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    report = read_report(tmp_path / "out" / "report.json")
    ours = [run for run in report.runs if run.engine == "builtin"]
    assert [(run.side, run.visit) for run in ours] == [("fast", 0), ("fast", 0), ("slow", 1), ("slow", 1)]
    for run in ours:
        assert run.figures.failures == {}
        assert run.arrival.kind == "trace" or run.figures.output_tokens == 6 * run.figures.requests
    assert len({run.figures.requests for run in ours if run.arrival.kind == "trace"}) == 1
    closed = {run.side: run.figures for run in ours if run.arrival.kind == "closed"}
    assert closed["fast"].prompt_tokens == closed["slow"].prompt_tokens  # the same prompts
    pace = {side: figures.tpot.p50 for side, figures in closed.items()}
    assert pace["slow"] >= 0.05
    assert pace["slow"] > pace["fast"]
    by_label = {side.label: side for side in report.sides}
    assert by_label["fast"].memory.kv_tokens == 32768
    assert by_label["peer"].foreign
    assert all(verdict.winner is None for verdict in report.verdicts)  # one repeat
    # on a machine that others keep busy the client may find every run of its own invalid
    assert ("no winner (fewer than 3 valid repeats" in printed) is bool(report.verdicts)
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    assert code == (0 if all(cell.metrics for cell in report.cells) else 1)


def test_a_foreign_server_is_measured_as_it_stands(tmp_path):
    command = [sys.executable, "-m", "loadtest.traffic.clockwork"]
    arguments = ["0.02", "0.01", str(tmp_path / "answers.jsonl")]
    with running(lambda port: [*command, str(port), *arguments], {}, 30, tmp_path / "log") as server:
        load = ["--concurrency", "2", "--workload", "5/4", "--passes", "1", "--output", str(tmp_path / "out")]
        main(["compare", "--server", server.url, "--label", "clock", "--server-model", "any", *load])
    (side,) = (report := read_report(tmp_path / "out" / "report.json")).sides
    assert (side.label, side.model, side.foreign, side.version, side.kernels) == ("clock", "any", True, "", [])
    assert side.memory == Memory(rss_bytes=side.memory.rss_bytes)
    assert side.memory.rss_bytes is None or side.memory.rss_bytes > 1e6  # a process of this machine; Linux tells
    assert "foreign" in side.quality.note
    (run,) = report.runs
    assert run.figures.failures == {}
    assert run.figures.output_tokens == 4 * run.figures.requests
    assert run.figures.ttft.p50 >= 0.02


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nobody to compare"),
        (["--model", "a=/no/such"], "no folder /no/such"),
        (
            ["--server", "http://127.0.0.1:9", "--server", "http://127.0.0.1:8", "--label", "a", "--label", "a"],
            "of its own",
        ),
        (["--server", "http://127.0.0.1:9", "--workload", "tea"], "unknown workload 'tea'"),
        (["--server", "http://127.0.0.1:9", "--concurrency", "a,b"], "--concurrency: expected positive numbers"),
        (["--server", "http://127.0.0.1:9", "--concurrency", ""], "no load"),
        (["--server", "http://127.0.0.1:9", "--trace", "/no/trace"], "no file /no/trace"),
        (["--server", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--server", "http://127.0.0.1:9", "--engine", "aiperf", "--aiperf", "no-aiperf"], "pip install aiperf"),
        (["--server", "http://127.0.0.1:9", "--engine", "aiperf", "--workload", "multi-turn"], "--engine builtin"),
        (["--server", "http://127.0.0.1:9", "--import", "x"], "expected LABEL=FILE"),
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_2(flags, message, capsys, tmp_path):
    assert main(["compare", *flags, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_committed_schema_is_the_one_the_code_has(capsys):
    assert main(["schema"]) == 0
    committed = REPOSITORY / "docs" / "benchmarks" / "loadtest-report.schema.json"
    assert json.loads(capsys.readouterr().out) == json.loads(committed.read_text())
