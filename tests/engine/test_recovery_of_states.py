"""A model with recurrent states: a failed step may have moved them on, and nobody else's tokens may show it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.scheduler import Schedule
from tests import tiny
from tests.engine.helpers import submit, tokens_of

GUILTY = 300  # a prompt that holds it makes the model raise, after its step has run


class RaisesAfterwards:
    """The real executor: the step runs, states move on, and then it raises if the guilty request was in it."""

    def __init__(self, inner: Any, draw: random.Random | None = None) -> None:
        self.inner, self.draw = inner, draw

    def execute(self, schedule: Schedule) -> Any:
        results = self.inner.execute(schedule)
        if any(GUILTY in entry.request.tokens[: entry.request.num_prompt_tokens] for entry in schedule.entries):
            raise RuntimeError("injected")
        if self.draw is not None and self.draw.random() < 0.15:
            raise MemoryError("injected")
        return results

    def probe(self) -> None:
        self.inner.probe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.nemotron_h_config()
    return tiny.write_plain(tmp_path_factory.mktemp("hybrid"), config, tiny.random_tensors(config, seed=6))


def engine_of(folder: Path) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            cache=CacheConfig(num_blocks=33),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24),
        )
    )


PROMPTS = [[7] * 3, list(range(10, 50)), [290, 5, 9], list(range(10, 45)), [1, 2]]


def run(engine: Engine) -> dict[str, Any]:
    for i, prompt in enumerate(PROMPTS):
        engine.add(submit(f"r{i}", prompt, 8))
    found: dict[str, list[Any]] = {}
    while engine.has_work:
        for output in engine.step()[0]:
            found.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    return found


@pytest.mark.parametrize("seed", range(8))
def test_only_the_guilty_request_ends_and_others_get_the_tokens_they_would_have_got(folder: Path, seed: int) -> None:
    expected = run(engine_of(folder))
    engine = engine_of(folder)
    draw = random.Random(seed)
    engine.recovery._executor = RaisesAfterwards(engine.executor, draw if seed else None)  # type: ignore[assignment]
    engine.add(submit("guilty", [5, GUILTY, 6], 8))
    found = run(engine)
    assert found.pop("guilty")[-1].finish_reason == "error"
    for name, outputs in found.items():
        if outputs[-1].finish_reason != "error":  # out of memory twice, alone: that ends a request too
            assert tokens_of(outputs) == tokens_of(expected[name]), name
    assert sum(outputs[-1].finish_reason != "error" for outputs in found.values()) >= (5 if seed == 0 else 3)
