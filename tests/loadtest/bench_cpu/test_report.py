"""llama.cpp's output is read rightly, tables say what was measured, and bars are met or missed by their numbers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from loadtest.bench_cpu import llama_cpp, report
from loadtest.bench_cpu.__main__ import NUMERICS, parse_arguments
from loadtest.bench_cpu.context import ContextFigure
from loadtest.bench_cpu.http_peer import HttpReading, summarise_http
from loadtest.bench_cpu.measure import Figure, Summary
from loadtest.bench_cpu.profile import StepProfile
from loadtest.bench_cpu.server_figures import ServerFigures
from loadtest.bench_cpu.shapes import SMALL

BENCH = '{"build_commit": "1652066", "n_prompt": 0, "n_gen": 8, "avg_ns": 1928021864, "avg_ts": 4.149331}\n'
BATCHED = (
    "\n0.00.1 I llama_context: n_ctx is not divisible\n"
    '{"n_kv_max": 4096, "pp": 16, "tg": 8, "pl": 8, "t_tg": 15.226225, "speed_pp": 27.7, "speed_tg": 4.203274}\n\n'
)


def test_llama_benchs_and_batched_benchs_lines_are_read():
    assert llama_cpp.parse_bench(BENCH) == 4.149331
    assert llama_cpp.parse_batched(BATCHED, 8) == 4.203274
    with pytest.raises(RuntimeError, match=r"asked .* for 16 sequences, it measured 8"):
        llama_cpp.parse_batched(BATCHED, 16)
    for output in ("", "failed to load model\n", BENCH + BENCH):
        with pytest.raises(RuntimeError, match="expected one line"):
            llama_cpp.parse_bench(output)


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_each_figure_asks_the_right_program(tmp_path):
    for name in ("llama-bench", "llama-batched-bench"):
        program(tmp_path, name, f'echo "{name} $@" >> {tmp_path}/log\ncat {tmp_path}/{name}.out')
    (tmp_path / "llama-bench.out").write_text(BENCH)
    (tmp_path / "llama-batched-bench.out").write_text(BATCHED)
    side = llama_cpp.LlamaCpp(llama_cpp.Build(tmp_path), Path("m.gguf"), "q4_0", 2)
    values = [side.measure(f) for f in (Figure("decode", 64), Figure("prefill", 512), Figure("decode", 48, batch=8))]
    assert values == [4.149331, 4.149331, 4.203274]
    decode, prefill, batched = (tmp_path / "log").read_text().splitlines()
    assert decode == "llama-bench -m m.gguf -t 2 -p 0 -n 64 -r 1 -o jsonl"
    assert prefill == "llama-bench -m m.gguf -t 2 -p 512 -n 0 -r 1 -o jsonl"
    assert batched.endswith("-npp 16 -ntg 48 -npl 8 --output-format jsonl")


def test_a_build_is_named_by_a_variable_and_must_be_whole(tmp_path, monkeypatch):
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert llama_cpp.find_build() is None
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: name == "llama_cpp" or None)
    assert llama_cpp.find_build() == llama_cpp.Build(None)  # the package of the extra `peers`
    monkeypatch.setenv(llama_cpp.VARIABLE, str(tmp_path))
    program(tmp_path, "llama-bench", "exit 0")
    with pytest.raises(SystemExit, match="has no llama-batched-bench, llama-quantize"):
        llama_cpp.find_build()
    for name in llama_cpp.PROGRAMS:
        program(tmp_path, name, "exit 0")
    build = llama_cpp.find_build()
    assert build == llama_cpp.Build(tmp_path)
    assert build.server is None
    program(tmp_path, llama_cpp.SERVER, "exit 0")
    assert build.server == tmp_path / llama_cpp.SERVER


def test_a_program_that_fails_says_why(tmp_path):
    program(tmp_path, "llama-bench", "echo 'no such model' >&2; exit 7")
    side = llama_cpp.LlamaCpp(llama_cpp.Build(tmp_path), Path("m.gguf"), "q4_0", 2)
    with pytest.raises(RuntimeError, match="ended with code 7:\nno such model"):
        side.measure(Figure("decode", 4))


def summary(side: str, figure: str, value: float, ratio: float | None = None) -> Summary:
    return Summary(side, figure, value, (value, value), {"read": 30e9, "vnni": 1500e9}, ratio)


SUMMARIES = [
    summary("nvfp4 w4a16", "decode 1", 40.0, 0.85),
    summary("llama.cpp nvfp4", "decode 1", 16.0, 0.35),
    summary("llama.cpp q4_0", "decode 1", 20.0),
    summary("llama.cpp q4_k_m", "decode 1", 28.0),
    summary("nvfp4 w4a16", "decode 8", 150.0, 0.6),
    summary("llama.cpp q4_0", "decode 8", 68.0),
    summary("nvfp4 w4a8", "prefill 512", 300.0, 0.39),
    summary("llama.cpp q4_k_m", "prefill 512", 111.0),
]


def test_bars_are_met_or_missed_by_the_numbers_and_take_the_fastest_four_bit_peer():
    bars = {bar.what: bar for bar in report.speed_bars(SMALL, SUMMARIES, NUMERICS)}
    assert {what: bar.met for what, bar in bars.items()} == {
        "0.44B w4a16 decode 1 / read bandwidth": True,
        "0.44B w4a16 decode 1 / llama.cpp q4_k_m": False,  # 40 / 28 = 1.43
        "0.44B w4a16 decode 1 / llama.cpp NVFP4": True,  # 2.5
        "0.44B w4a16 decode 8 / llama.cpp q4_0": True,  # 2.206
        "0.44B w4a8 prefill 512 / VNNI peak": False,
        "0.44B w4a8 prefill 512 / llama.cpp q4_k_m": True,  # 2.7
    }
    missed = str(bars["0.44B w4a8 prefill 512 / VNNI peak"])
    assert missed == "MISSED  0.44B w4a8 prefill 512 / VNNI peak: 39.0 % (asked >= 40.0 %)"
    assert report.speed_bars(SMALL, [summary("nvfp4 w4a16", "prefill 128", 300.0, 0.9)], NUMERICS) == []
    assert report.speed_bars(SMALL, [s for s in SUMMARIES if "llama" in s.side], NUMERICS) == []


def test_less_is_better_where_a_bar_says_so():
    fp8 = ContextFigure("fp8", 0.03, 0.010, 200e6, 0.75, 0.8)
    slower = ContextFigure("nvfp4", 0.04, 0.012, 110e6, 0.4, 0.6)
    assert [bar.met for bar in report.context_bars([fp8, slower])] == [True, False]
    figures = ServerFigures([2.4, 2.6, 2.4], {}, {"1 a": 900_000_000}, {"1 a": 1_500_000_000}, 810_000_000)
    memory, start = report.server_bars({"1.1B": figures}, "1.1B")
    assert memory.met  # 1500 of 810 + 268 + 600
    assert start.met
    assert start.found == 2.4
    assert not report.profile_bars(StepProfile(0.01, {}, 0.11))[0].met


def test_tables_are_markdown_with_one_cell_per_head():
    tables = [
        report.speed_table(SUMMARIES),
        report.limits_table({"read": (28e9, 30e9, 31e9), "vnni": (900e9, 940e9, 950e9)}),
        report.context_table([ContextFigure("fp8", 0.03, 0.010, 200e6, 0.75, 0.8)]),
        report.profile_table(StepProfile(0.01, {"kernels": 0.009}, 0.1)),
    ]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "| nvfp4 w4a16 | 40.0 (85 %) | 150.0 (60 %) | - |" in tables[0]
    assert "| llama.cpp q4_0 | 20.0 | 68.0 | - |" in tables[0]
    assert "| GB/s read | 28.0 | 30.0 | 31.0 |" in tables[1]


def test_http_rows_compare_medians_where_both_sides_answered():
    ours = [HttpReading("nvfp4", 8, rate, 0.1) for rate in (100.0, 300.0, 200.0)]
    theirs = [HttpReading("llama.cpp", 8, rate, 0.2) for rate in (100.0, 100.0, 90.0)]
    assert summarise_http([*ours, *theirs])[0]["ratio"] == 2.0
    alone = summarise_http(ours)[0]
    assert alone["nvfp4"]["tokens_per_second"] == 200.0
    assert "ratio" not in alone
    assert "| 8 | 200.0 | - | - | 100 | - |" in report.http_table([alone])


def test_a_quick_run_is_one_round():
    args = parse_arguments(["--quick", "--json", "x.json"])
    assert (args.rounds, args.starts, args.json) == (1, 1, Path("x.json"))
