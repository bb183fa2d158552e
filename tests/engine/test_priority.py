"""Requests go by priority, lower first, and by arrival within one; out of blocks, the last in rank gives way."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine.helpers import make_engine, run_to_end, tokens_of


def submit(request_id: str, priority: int, prompt: list[int], max_tokens: int = 4) -> Submit:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Submit(request_id, prompt, params, time.monotonic(), priority=priority)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_waiting_requests_start_by_priority_then_by_arrival(priorities: list[int], width: int) -> None:
    engine = make_engine(max_num_seqs=width)
    for i, priority in enumerate(priorities):
        engine.add(submit(str(i), priority, [i + 1, 2, 3]))
    started: list[str] = []
    for outputs in run_to_end(engine).values():
        started.append(outputs[0].request_id)
    assert started == [str(i) for i in sorted(range(len(priorities)), key=lambda i: (priorities[i], i))]


def test_a_later_request_of_lower_priority_value_overtakes_those_that_wait() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(submit("running", 5, [1, 2, 3]))
    engine.step()
    engine.add(submit("patient", 0, [4, 5, 6]))
    engine.add(submit("urgent", -1, [7, 8, 9]))
    ended = [output.request_id for outputs in run_to_end(engine).values() for output in outputs if output.finish_reason]
    assert ended == ["running", "urgent", "patient"], "what runs is not interrupted for it"


def test_out_of_blocks_the_request_of_the_highest_priority_value_is_preempted() -> None:
    engine = make_engine(num_blocks=18, max_model_len=68)
    for name, priority in (("low", 9), ("first", 0), ("second", 0)):
        engine.add(submit(name, priority, [len(name)] * 20, 40))
    preempted = set()
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        preempted |= {request.id for request in engine.scheduler.waiting if request.times.first_token}
        if engine.scheduler.num_preemptions == 1:
            assert preempted == {"low"}, "although it arrived first"
    assert engine.scheduler.num_preemptions > 0


def test_priorities_do_not_change_what_is_said() -> None:
    def answers(priorities: list[int]) -> list[list[int]]:
        engine = make_engine(max_num_seqs=2, num_blocks=18, max_model_len=68)
        for i, priority in enumerate(priorities):
            engine.add(submit(str(i), priority, [i + 1] * 20, 30))
        outputs = run_to_end(engine)
        return [tokens_of(outputs[str(i)]) for i in range(len(priorities))]

    assert answers([0, 0, 0, 0]) == answers([3, -2, 7, 0])
