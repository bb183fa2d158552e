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
from tests.engine.test_device_runner import native_engine, on_twin

GUILTY = 300  # a prompt that holds it makes the model raise, after its step has run


class RaisesAfterwards:
    """The real executor: the step runs, states move on, and then it raises if the guilty request was in it."""

    def __init__(self, inner: Any, draw: random.Random | None = None) -> None:
        self.inner, self.draw = inner, draw

    def execute(self, schedule: Schedule) -> Any:
        results = self.inner.execute(schedule)
        if any(GUILTY in entry.request.tokens[: entry.request.num_prompt_tokens] for entry in schedule.entries):
            raise RuntimeError("injected")
        if self.draw is not None and self.draw.random() < 0.08:
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


class FailedTicket:
    """A launched step whose results do not arrive."""

    def __init__(self, ticket: Any) -> None:
        self.chosen_on_host = ticket.chosen_on_host

    def wait(self) -> Any:
        raise RuntimeError("injected")


class UnsteadyLauncher:
    """A device runner that fails after states have moved on: at the launch itself, or when its results are read. Only
    with company, as a request whose step fails alone ends."""

    def __init__(self, inner: Any, draw: random.Random) -> None:
        self.inner, self.draw, self.num_failed = inner, draw, 0
        self.execute, self.probe, self.settle = inner.execute, inner.probe, inner.settle

    def launch(self, schedule: Schedule) -> Any:
        ticket, fate = self.inner.launch(schedule), self.draw.random()
        if len(schedule.entries) < 3 or fate > 0.5:
            return ticket
        self.num_failed += 1
        if fate < 0.25:
            raise RuntimeError("injected")
        return FailedTicket(ticket)


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


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_fail_on_a_device_are_computed_again_on_the_states_they_began_with(folder: Path, seed: int) -> None:
    """A step that failed, and the one launched behind it, both moved states on; nobody ends, and tokens are those of an
    engine without faults. Prompts are longer than a step's 24 tokens, so states are brought back piece by piece."""
    config = EngineConfig(
        model=str(folder),
        cache=CacheConfig(num_blocks=33),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24),
    )
    plain = native_engine(config)
    engine, *_ = on_twin(config, plain)
    launcher: Any = UnsteadyLauncher(engine.executor, random.Random(seed))
    engine.executor = launcher
    engine.recovery._executor = launcher
    expected, found = run(plain), run(engine)
    assert launcher.num_failed > 1
    assert {name: tokens_of(each) for name, each in found.items()} == {
        name: tokens_of(each) for name, each in expected.items()
    }
    assert engine.scheduler.pool.num_used == 0
