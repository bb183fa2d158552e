"""Within a priority tenants take turns by what was computed for them; one tenant is served first come first served."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine.helpers import make_engine, run_to_end


def submit(name: str, tenant: str, tokens: int = 4, priority: int = 0) -> Submit:
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    prompt = [1 + sum(map(ord, name)) % 90, len(name), 3]
    return Submit(name, prompt, params, time.monotonic(), priority=priority, tenant=tenant)


def order(engine: Engine) -> list[str]:
    """Who began, in order."""
    return list(run_to_end(engine))


def test_a_flood_of_one_key_does_not_hold_up_another() -> None:
    engine = make_engine(max_num_seqs=1, prefix=False)
    for i in range(10):
        engine.add(submit(f"a{i}", "a"))
    for _ in range(3):
        engine.step()
    for i in range(3):
        engine.add(submit(f"b{i}", "b"))
    assert order(engine)[:7] == ["a0", "b0", "a1", "b1", "a2", "b2", "a3"]


def test_long_answers_count_for_what_they_cost() -> None:
    engine = make_engine(max_num_seqs=1, prefix=False)
    for i in range(4):
        engine.add(submit(f"a{i}", "a", tokens=40))
        engine.add(submit(f"b{i}", "b", tokens=4))
    begun = order(engine)
    assert begun[:6] == ["a0", "b0", "b1", "b2", "b3", "a1"], "four short answers cost less than a long one"


def test_priority_goes_before_fairness() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(submit("first", "a"))
    engine.step()
    engine.add(submit("poor", "b"))
    engine.add(submit("urgent", "a", priority=-1))
    assert order(engine) == ["first", "urgent", "poor"]


def test_who_comes_back_after_a_pause_has_saved_nothing_up() -> None:
    engine = make_engine(max_num_seqs=1, prefix=False)
    engine.add(submit("b", "b"))
    run_to_end(engine)
    for i in range(20):
        engine.add(submit(f"a{i}", "a"))
    for _ in range(40):
        engine.step()
    for i in range(8):
        engine.add(submit(f"b{i}", "b"))
    begun = order(engine)
    first = begun[begun.index("b0") :][:8]
    assert Counter(name[0] for name in first) == {"a": 4, "b": 4}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(1, 20), st.integers(-1, 1)), max_size=20))
def test_everything_ends_in_any_mixture_even_when_blocks_are_short(requests: list[tuple[str, int, int]]) -> None:
    engine = make_engine(max_num_seqs=3, num_blocks=14, max_model_len=40)
    for i, (tenant, tokens, priority) in enumerate(requests):
        engine.add(submit(str(i), tenant, tokens, priority))
        engine.step()
        engine.scheduler.check()
    ended = run_to_end(engine)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.total
    assert all(outputs[-1].finish_reason for outputs in ended.values())
