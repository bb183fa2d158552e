"""The families' benchmark: sizes as promised, bytes that a step touches, and models that the engine runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench_cpu.workers import Engine
from loadtest.bench_families import prompts
from loadtest.bench_families.__main__ import config, dense_bytes, expert_bytes, reading, step_bytes, table
from loadtest.bench_families.checkpoints import ensure
from loadtest.bench_families.families import FAMILIES, HYBRID, LATENT, MIXTURE, Family, hybrid, latent, mixture

TINY = [
    mixture("tiny-moe", 64, 2, 4, 2, 16, experts=4, top_k=2, inner=32),
    hybrid("tiny-hybrid", 64, "M-*", 4, 2, 16, 4, 16, 16, 2, 128),
    latent("tiny-latent", 64, 2, 4, 32, 32, 16, 16, 16, experts=8, top_k=2, inner=32, dense=128),
]
LAYERS = [
    {"name": "experts.down_proj", "stored": "nvfp4", "num_bytes": 800},
    {"name": "lm_head", "stored": "bfloat16", "num_bytes": 100},
    {"name": "mixture", "stored": "-", "num_bytes": 0},
]


def test_the_measured_models_have_the_sizes_that_are_promised() -> None:
    assert 2e9 < MIXTURE.num_parameters < 4e9
    assert 0.4e9 < MIXTURE.num_active < 0.6e9
    assert 0.8e9 < HYBRID.num_parameters < 1.2e9
    assert HYBRID.state_bytes == 4 * 12 * (64 * 64 * 128 + 3 * (64 * 64 + 2 * 8 * 128))
    assert LATENT.num_active < 0.3e9
    assert len(FAMILIES) == 3


def test_a_step_touches_dense_weights_once_its_experts_once_and_what_its_sequences_keep() -> None:
    family = Family("f", {}, {}, {}, moe_layers=2, num_experts=4, top_k=1, state_bytes=10, kv_bytes=3)
    assert dense_bytes(LAYERS) == 100
    assert expert_bytes(LAYERS, family) == 100
    assert step_bytes(LAYERS, family, 2, 3, 5) == 100 + 3 * 100 + 2 * (2 * 10 + 5 * 3)


def test_a_reading_is_the_median_of_the_steps_with_a_token_for_everybody() -> None:
    family = Family("f", {}, {}, {})
    slow = [{"tokens": 1, "seconds": 9.0, "experts": 0}] + [{"tokens": 2, "seconds": 9.0, "experts": 0}] * 8
    found = reading([*slow, *[{"tokens": 2, "seconds": 0.5, "experts": 0}] * 3], LAYERS, family, 2, read=300.0)
    assert (found.batch, found.step_seconds, found.step_bytes, found.times_bound) == (2, 0.5, 100, 1.5)
    rows = [{"batch": 2, "step_seconds": 0.5, "step_bytes": 100.0, "read": 300.0, "times_bound": 1.5}]
    assert "| f | 2 | 4.0 | 500.00 | 0 | 0.0 | 1.50 | MISSED |" in table({"f": {"readings": rows}})
    with pytest.raises(ValueError, match="no step of 3 tokens"):
        reading(slow, LAYERS, family, 3, read=1.0)


@pytest.mark.parametrize("family", TINY, ids=lambda family: family.name)
def test_the_engine_runs_it_and_says_how_many_experts_each_step_ran(family: Family, tmp_path: Path) -> None:
    folder = ensure(family, tmp_path)
    assert ensure(family, tmp_path) == folder
    engine = Engine(family.name, config(folder, 1), tmp_path / "log", steps=True)
    engine.generate([engine.prompt(5), engine.prompt(5)], 12)
    steps = [step for step in engine.profile() if step["tokens"] == 2][1:]  # the first one is of the prompts
    assert len(steps) >= 10
    for step in steps:
        assert family.top_k * family.moe_layers <= step["experts"] <= 2 * family.top_k * family.moe_layers


def test_prompts_run_expanded_and_absorbed_and_their_table_has_the_ratio(tmp_path: Path) -> None:
    found = prompts.measure(config(ensure(TINY[2], tmp_path), 1), [70], 2, tmp_path / "log")
    assert {way: [len(of) for of in lengths.values()] for way, lengths in found.items()} == {
        "expanded": [2],
        "absorbed": [2],
    }
    assert "| 70 | 35 | 70 | 2.00 |" in prompts.table("f", {"expanded": {70: [1.0]}, "absorbed": {70: [2.0]}})
