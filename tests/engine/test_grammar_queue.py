"""Grammars are compiled beside the steps: requests wait, get in, are refused, aborted, or lose patience."""

from __future__ import annotations

import select
import threading
import time
from typing import Any

import pytest

from nvfp4_runtime.engine.grammar_queue import COMPILE_SECONDS, GrammarQueue
from nvfp4_runtime.engine.simulated import simulated_engine
from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.spec import StructuredSpec
from tests.engine.helpers import make_config, run_to_end, submit, tokens_of

LONG = StructuredSpec(kind="regex", value="a" * 5000)
GOOD, BAD = StructuredSpec(kind="regex", value="[ab]{3}"), StructuredSpec(kind="regex", value="(")


class SlowCompiler:
    """Compiles when told to."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.known: set[str] = set()

    def knows(self, spec: StructuredSpec) -> bool:
        return spec.value in self.known

    def needs_trial(self, spec: StructuredSpec) -> bool:
        return spec == LONG

    def compile(self, spec: StructuredSpec) -> None:
        self.begun.set()
        assert self.go.wait(30)
        self.known.add(spec.value)
        if spec == BAD:
            raise InvalidParameterError("structured_outputs.regex is wrong", "structured_outputs")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def compiler() -> Any:
    made = SlowCompiler()
    yield made
    made.go.set()


def ready_soon(queue: GrammarQueue) -> list[Any]:
    readable, _, _ = select.select([queue], [], [], 10)
    assert readable, "nobody woke the engine"
    return queue.ready()


def test_request_without_a_grammar_or_with_a_known_one_does_not_wait(compiler: Any) -> None:
    queue = GrammarQueue(compiler)
    compiler.known.add(GOOD.value)
    assert not queue.takes(submit("free", [1]))
    assert not queue.takes(submit("known", [1], structured=GOOD))
    assert (len(queue), queue.seconds_left()) == (0, None)


def test_waiting_requests_come_back_with_a_grammar_or_with_why_not(compiler: Any) -> None:
    queue = GrammarQueue(compiler)
    assert queue.takes(submit("good", [1], structured=GOOD))
    assert queue.takes(submit("bad", [1], structured=BAD))
    assert queue.ready() == []
    compiler.go.set()
    over: dict[str, Any] = {}
    while len(over) < 2:
        over |= {request.request_id: error for request, error in ready_soon(queue)}
    assert over["good"] is None
    assert isinstance(over["bad"], InvalidParameterError)
    assert len(queue) == 0


def test_aborted_request_is_forgotten(compiler: Any) -> None:
    queue = GrammarQueue(compiler)
    queue.takes(submit("gone", [1], structured=GOOD))
    assert queue.drop("gone")
    assert not queue.drop("gone")
    compiler.go.set()
    time.sleep(0.05)
    assert queue.ready() == []


def test_compile_that_takes_too_long_is_that_requests_error(compiler: Any) -> None:
    clock = Clock()
    queue = GrammarQueue(compiler, clock)
    queue.takes(submit("slow", [1], structured=GOOD))
    assert compiler.begun.wait(30)
    clock.now = COMPILE_SECONDS - 1
    assert queue.ready() == []
    assert queue.seconds_left() == 1
    clock.now = COMPILE_SECONDS
    ((request, error),) = queue.ready()
    assert request.request_id == "slow"
    assert error is not None
    assert "took longer" in str(error)
    assert error.param == "structured_outputs"


def test_a_request_whose_turn_has_not_come_does_not_pay_for_the_one_before_it(compiler: Any) -> None:
    clock = Clock()
    queue = GrammarQueue(compiler, clock)
    queue.takes(submit("slow", [1], structured=GOOD))
    assert compiler.begun.wait(30)
    queue.takes(submit("behind", [1], structured=BAD))
    clock.now = COMPILE_SECONDS
    ((request, _),) = queue.ready()
    assert request.request_id == "slow"
    clock.now = COMPILE_SECONDS * 5
    assert queue.ready() == []
    assert queue.seconds_left() == COMPILE_SECONDS


def test_grammars_that_need_a_trial_hold_up_only_each_other(compiler: Any) -> None:
    queue = GrammarQueue(compiler)
    go = compiler.go
    compiler.go = threading.Event()  # what the long one waits for
    queue.takes(submit("long", [1], structured=LONG))
    assert compiler.begun.wait(30)
    long_go, compiler.go = compiler.go, go
    queue.takes(submit("short", [1], structured=GOOD))
    go.set()
    ((request, error),) = ready_soon(queue)
    assert (request.request_id, error) == ("short", None)
    long_go.set()
    ((request, error),) = ready_soon(queue)
    assert (request.request_id, error) == ("long", None)


def test_engine_follows_grammars_under_preemption_and_stops_when_they_are_complete() -> None:
    pytest.importorskip("llguidance", reason="package llguidance is not installed")
    from nvfp4_runtime.config import SimulatedConfig

    simulated = SimulatedConfig(vocab_size=259, eos_token_id=258)
    engine = simulated_engine(make_config(num_blocks=12, simulated=simulated))
    spec = StructuredSpec(kind="regex", value="[a-z]{20}[0-9]")
    for i in range(6):
        structured = spec if i % 2 else None
        engine.add(submit(f"{i}", [1, 2, 3, i], max_tokens=30, structured=structured, temperature=1.0, seed=i))
    outputs = run_to_end(engine)
    assert engine.scheduler.num_preemptions > 0
    for i in range(6):
        tokens, last = tokens_of(outputs[f"{i}"]), outputs[f"{i}"][-1]
        if i % 2:
            text = bytes(tokens).decode()
            assert text[:20].isalpha()
            assert text[20:].isdigit()
            assert (len(text), last.finish_reason, last.ends_whole) == (21, "stop", True)
        else:
            assert (last.finish_reason, last.ends_whole) == ("length", False)


def test_engine_refuses_a_wrong_grammar_at_once() -> None:
    pytest.importorskip("llguidance", reason="package llguidance is not installed")
    engine = simulated_engine(make_config())
    with pytest.raises(InvalidParameterError, match="regex"):
        engine.add(
            submit("bad", [1], structured=StructuredSpec(kind="regex", value="(", param="structured_outputs.regex"))
        )
    assert not engine.has_work
