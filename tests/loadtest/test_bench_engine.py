"""The engine benchmark's arithmetic, its turns, and the transformers side on a tiny model."""

from __future__ import annotations

import random

import pytest

from loadtest.bench_engine import Plan, Transformers, bars, bf16_sibling, make_prompts, measure, summarise, table
from tests.tiny import tiny_llama

PLAN = Plan(batches=(1, 8), repeats=3, prefill_tokens=100, decode_prompt_tokens=4, decode_tokens=10)


class Scripted:
    """A side with known speeds that writes down its turns."""

    def __init__(
        self, name: str, seconds: list[float], rates: list[float], log: list[tuple[str, str, list[list[int]]]]
    ):
        self.name, self.log = name, log
        self._seconds, self._rates = iter(seconds), iter(rates)

    def prefill(self, prompts):
        self.log.append((self.name, "prefill", prompts))
        return next(self._seconds)

    def decode(self, prompts, max_tokens):
        self.log.append((self.name, "decode", prompts))
        return 0.0 if max_tokens == 4 else next(self._rates)


def test_sides_take_turns_on_the_same_prompts_and_medians_are_compared():
    log: list = []
    a = Scripted("a", [1.0, 2.0, 4.0] * 2, [30.0, 10.0, 20.0, 800.0, 900.0, 700.0], log)
    b = Scripted("b", [2.0, 2.0, 2.0] * 2, [10.0, 10.0, 50.0, 80.0, 80.0, 80.0], log)
    summary = summarise(measure([a, b], PLAN, vocab_size=1000), "a", "b")
    assert summary[0] == {
        "batch": 1,
        "prefill": {"a": 50.0, "b": 50.0, "ratio": 1.0},
        "decode": {"a": 20.0, "b": 10.0, "ratio": 2.0},
    }
    assert summary[1]["prefill"]["a"] == 8 * 50
    assert summary[1]["decode"]["ratio"] == 10
    turns = [(name, leg) for name, leg, _ in log]
    one_turn = [("a", "prefill"), ("a", "decode"), ("b", "prefill"), ("b", "decode")]
    assert turns == ([("a", "decode"), ("b", "decode")] + one_turn * 3) * 2
    for first in range(2, 14, 4):
        assert log[first][2] == log[first + 2][2]
        assert log[first + 1][2] == log[first + 3][2]
    assert "20.0" in table(summary, "a", "b")
    assert bars(summary, "a", "b") == [
        "decode at batch 1: 2.00 x b' single stream (asked: 1 x) reached",
        "decode at batch 8: 80.00 x b' single stream (asked: 4 x) reached",
    ]
    assert all(line.endswith("MISSED") for line in bars(summarise([swapped(row) for row in ROWS], "a", "b"), "a", "b"))


ROWS = [
    {"batch": 1, "a": {"prefill": [1.0], "decode": [10.0]}, "b": {"prefill": [1.0], "decode": [9.0]}},
    {"batch": 8, "a": {"prefill": [1.0], "decode": [40.0]}, "b": {"prefill": [1.0], "decode": [39.0]}},
]


def swapped(row: dict) -> dict:
    return {"batch": row["batch"], "a": row["b"], "b": row["a"]}


def test_prompts_share_no_beginning_and_avoid_special_tokens():
    prompts = make_prompts(random.Random(0), 32, 40, 49152)
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 32
    assert all(49152 // 8 <= token < 49152 for prompt in prompts for token in prompt)


def test_the_bf16_folder_is_found_beside_the_served_one_or_asked_for(tmp_path):
    (tmp_path / "Some-BF16").mkdir()
    assert bf16_sibling(str(tmp_path / "Some-NVFP4")) == tmp_path / "Some-BF16"
    for other in ("Other-NVFP4", "Some"):
        with pytest.raises(SystemExit, match="--baseline-model"):
            bf16_sibling(str(tmp_path / other))


@pytest.mark.slow
def test_the_transformers_side_generates_exactly_what_is_asked(tmp_path):
    model = tiny_llama(tmp_path / "model")
    side = Transformers(str(model), 1, "float32", {"OMP_NUM_THREADS": "1"}, tmp_path / "log")
    try:
        assert side.facts["vocab_size"] == 320
        prompts = make_prompts(random.Random(0), 3, 20, 320)
        assert side.prefill(prompts) > 0
        assert side.decode(prompts, 8) > 0
    finally:
        side.close()


@pytest.mark.slow
def test_a_transformers_worker_that_dies_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"the transformers worker ended(.|\n)*nowhere"):
        Transformers(str(tmp_path / "nowhere"), 1, "float32", {}, tmp_path / "log")
