"""Turns, ratios and medians of the CPU benchmark, on sides and limits whose every number is known."""

from __future__ import annotations

import itertools

import pytest

from loadtest.bench_cpu import context, profile
from loadtest.bench_cpu.measure import Figure, Reading, limit_spread, measure, summarise
from loadtest.bench_cpu.report import ratio_to_limit
from loadtest.bench_cpu.server_figures import process_tree, pss_by_process, pss_of
from loadtest.bench_cpu.shapes import SMALL
from loadtest.bench_cpu.workers import decode_rate

DECODE, EIGHT, PREFILL = Figure("decode", 64), Figure("decode", 48, batch=8), Figure("prefill", 512)


class Scripted:
    def __init__(self, name: str, values: list[float], log: list[tuple[str, str]]) -> None:
        self.name, self._values, self._log = name, iter(values), log

    def measure(self, figure: Figure) -> float:
        self._log.append((self.name, figure.name))
        return next(self._values)


def test_sides_take_turns_with_the_limits_measured_round_each_reading():
    log: list[tuple[str, str]] = []
    bandwidth = itertools.count(10)  # 10, 11, 12, ...

    def limits() -> dict[str, float]:
        log.append(("limits", ""))
        return {"read": float(next(bandwidth))}

    sides = [Scripted("a", [1.0, 2.0, 3.0, 4.0], log), Scripted("b", [5.0, 6.0, 7.0, 8.0], log)]
    readings = measure(sides, [DECODE, PREFILL], 2, limits, lambda text: None)
    turns = [name for name, _ in log]
    assert turns == ["limits", *["a", "limits", "b", "limits"] * 4]
    assert [r.figure for r in readings] == ["decode 1", "decode 1", "prefill 512", "prefill 512"] * 2
    assert [r.limits["read"] for r in readings] == [10.5 + i for i in range(8)]
    summary = {(s.side, s.figure): s for s in summarise(readings, lambda r: r.value / r.limits["read"])}
    first = summary["a", "decode 1"]  # readings 1.0 at 10.5 and 3.0 at 14.5
    assert (first.value, first.spread, first.limits) == (2.0, (1.0, 3.0), {"read": 12.5})
    assert first.ratio == pytest.approx((1 / 10.5 + 3 / 14.5) / 2)
    assert limit_spread(readings) == {"read": (10.5, 14.0, 17.5)}


def test_a_ratio_is_bytes_over_bandwidth_for_decode_and_operations_over_vnni_for_prefill():
    ratio = ratio_to_limit(SMALL, {"ours": SMALL.token_bytes()})
    limits = {"read": 30e9, "vnni": 1500e9}
    assert ratio(Reading("ours", DECODE.name, 50.0, limits)) == pytest.approx(50 * SMALL.token_bytes() / 30e9)
    # eight sequences share one reading of the weights
    assert ratio(Reading("ours", EIGHT.name, 160.0, limits)) == pytest.approx(20 * SMALL.token_bytes() / 30e9)
    assert ratio(Reading("ours", PREFILL.name, 800.0, limits)) == pytest.approx(800 * 2 * SMALL.num_linear / 1500e9)
    assert ratio(Reading("unknown", DECODE.name, 50.0, limits)) is None
    assert ratio(Reading("ours", PREFILL.name, 800.0, {"read": 30e9})) is None


def test_decode_rate_counts_only_while_every_sequence_decodes():
    # b's first token comes at 2, a ends at 5: in (2, 5] a makes 3 tokens, b makes 6
    a = [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1)]
    b = [(2.0, 1), (3.0, 2), (4.0, 2), (5.0, 2), (6.0, 2)]
    assert decode_rate([a, b]) == pytest.approx(9 / 3)
    assert decode_rate([a]) == pytest.approx(1.0)


def test_attention_at_a_long_context_is_the_step_less_a_short_step():
    gigabyte = SMALL.kv_bytes(context.CONTEXT - context.SHORT, 1.0) / 1e9
    figure = context.context_figure(
        SMALL, "fp8", 278e6, [(0.030, 0.010, 20e9), (0.050, 0.010, 20e9), (0.030, 0.010, 20e9)]
    )
    assert figure.attention_seconds == pytest.approx(0.020)
    assert figure.ratio == pytest.approx(gigabyte / 0.020 / 20)
    assert figure.step_ratio == pytest.approx((278e6 + SMALL.kv_bytes(context.CONTEXT, 1.0)) / 0.030 / 20e9)


def test_a_profile_takes_single_token_steps_after_the_first_ones_and_its_parts_add_up():
    parts = {
        "native": 0.006,
        "forward": 0.007,
        "prepare batch": 0.001,
        "sample": 0.0005,
        "schedule": 0.0,
        "commit": 0.0,
    }
    slow = {"tokens": 1, "seconds": 9.0, "parts": dict.fromkeys(parts, 1.0)}
    batch = {"tokens": 4, "seconds": 5.0, "parts": dict.fromkeys(parts, 1.0)}
    steps = [slow] * profile.SKIPPED_STEPS + [batch] * 20 + [{"tokens": 1, "seconds": 0.01, "parts": parts}] * 3
    found = profile.step_profile(steps)
    assert found.step == 0.01
    assert found.outside == pytest.approx(0.4)
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert found.parts["messages and the rest of the loop"] == pytest.approx(0.0015)
    with pytest.raises(ValueError, match="no step of 2 tokens"):
        profile.step_profile(steps, batch=2)


def test_pss_is_read_for_the_whole_process_tree():
    rollup = "55 ---p 0 00:00 0   [rollup]\nRss:   9000 kB\nPss:    123 kB\nPss_Anon:   100 kB\n"
    assert pss_of(rollup) == 123 * 1024
    with pytest.raises(ValueError, match="no Pss"):
        pss_of("Rss: 1 kB\n")
    import os
    import subprocess
    import sys

    child = "import sys; data = bytearray(40_000_000); print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.pid in process_tree(os.getpid())
        found = pss_by_process(process.pid)
        assert list(found) == [key for key in found if key.startswith(f"{process.pid} ")]
        assert 40_000_000 < sum(found.values()) < 80_000_000
        assert process.stdin is not None
        process.stdin.close()
