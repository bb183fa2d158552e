"""The engine behind a pipe: exact token counts, refusals in words, and a profile whose parts lie inside their step."""

from __future__ import annotations

import time

import pytest

from loadtest.bench_cpu.workers import Engine, Refused
from nvfp4_runtime.engine.bench import parse_config
from nvfp4_runtime.engine.bench_steps import PartTimer
from nvfp4_runtime.errors import ConfigError
from tests.tiny import tiny_nvfp4_llama


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tiny_nvfp4_llama(tmp_path_factory.mktemp("bench") / "model", vocab_size=640)
    cache = {"num_blocks": 65, "enable_prefix_caching": False}
    return {"model": str(folder), "threads": 1, "cache": cache, "numerics": "w4a16"}


def test_prompts_run_together_and_each_gives_exactly_its_tokens(config, tmp_path):
    engine = Engine("tiny", config, tmp_path / "log")
    try:
        streams = engine.generate([[5, 6, 7], [8]], 6)
        assert [sum(count for _, count in stream) for stream in streams] == [6, 6]
        for stream in streams:
            times = [seconds for seconds, _ in stream]
            assert times == sorted(times)
            assert times[0] > 0
        packed = sum(g["num_bytes"] for g in engine.info["layers"] if g["stored"] == "nvfp4")
        assert engine.token_bytes() == packed + 640 * 64 * 4  # the head: float32 in this fixture
        assert engine.step_seconds([5, 6], 8) > 0
    finally:
        engine.close()


def test_a_profile_accounts_for_every_step(config, tmp_path):
    engine = Engine("tiny", config, tmp_path / "log", profile=True)
    engine.generate([[5, 6, 7]], 10)
    steps = engine.profile()
    assert [step["tokens"] for step in steps] == [1] * 10
    native = engine.info["backends"].get("cpu", {}).get("isa")
    for step in steps:
        parts = step["parts"]
        assert parts["native"] <= parts["forward"] <= step["seconds"]
        assert parts["forward"] + parts["prepare batch"] + parts["sample"] <= step["seconds"]
        assert (parts["native"] > 0) == (native is not None)


def test_what_the_engine_refuses_arrives_as_its_words(config, tmp_path):
    with pytest.raises(Refused, match="w2a2"):
        Engine("tiny", config | {"numerics": "w2a2"}, tmp_path / "log")
    with pytest.raises(Refused, match="not a folder"):
        Engine("tiny", config | {"model": str(tmp_path / "nowhere")}, tmp_path / "log")


def test_unknown_settings_are_refused_by_name():
    assert parse_config('{"model": "m", "cache": {"num_blocks": 3}}').cache.num_blocks == 3
    for text, name in (('{"modl": "m"}', "modl"), ('{"cache": {"blocks": 3}}', "cache.blocks")):
        with pytest.raises(ConfigError, match=f"unknown setting {name};"):
            parse_config(text)
    with pytest.raises(ConfigError, match="threads"):
        parse_config('{"threads": "two"}')


def test_a_part_timer_adds_up_what_passes_inside_and_keeps_results_and_errors():
    class Thing:
        size = 3

        def work(self, seconds: float) -> str:
            time.sleep(seconds)
            if seconds > 0.015:
                raise ValueError("too long")
            return "done"

    timer = PartTimer()
    timer.wrap(Thing, "work", "part")
    timer.wrap(Thing, "size", "other")
    assert Thing().work(0.01) == "done"
    with pytest.raises(ValueError, match="too long"):
        Thing().work(0.02)
    assert timer.seconds["part"] >= 0.03
    assert list(timer.seconds) == ["part"]
    assert Thing.size == 3
