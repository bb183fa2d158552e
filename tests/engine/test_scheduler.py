"""Scheduling, preemption, prefix caching and abort over the simulated executor: nothing is lost, nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import TokenOutput
from nvfp4_runtime.engine.scheduler import Schedule, StepResult
from nvfp4_runtime.engine.simulated import SimulatedExecutor
from nvfp4_runtime.errors import InvalidParameterError, PromptTooLongError, QueueFullError
from tests.engine.helpers import make_engine, run_to_end, submit, tokens_of


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """The tokens of a request that has a roomy engine to itself."""
    engine = make_engine(num_blocks=257)
    engine.add(submit("r", prompt, max_tokens))
    return tokens_of(run_to_end(engine)["r"])


SEEN = {"preemptions": 0, "prefix hits": 0, "aborts": 0}


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(18, 21),
    budget=st.integers(1, 48),
    max_num_seqs=st.integers(2, 6),
    prefix=st.booleans(),
    data=st.data(),
)
def any_sequence_of_actions(num_blocks: int, budget: int, max_num_seqs: int, prefix: bool, data: st.DataObject) -> None:
    engine = make_engine(
        num_blocks=num_blocks, budget=budget, max_num_seqs=max_num_seqs, prefix=prefix, max_model_len=64
    )
    executor = RememberingExecutor(engine)
    engine.executor = executor
    expected: dict[str, list[int]] = {}
    got: dict[str, list[TokenOutput]] = {}
    aborted: set[str] = set()
    actions = st.sampled_from(["add", "add", "step", "step", "step", "abort", "preempt"])
    for action in data.draw(st.lists(actions, min_size=20, max_size=60)):
        if action == "add":
            # few distinct starts, so that prefixes are shared
            prompt = [data.draw(st.integers(0, 1))] * data.draw(st.integers(10, 36))
            count = data.draw(st.integers(4, 28))
            name = f"r{len(expected)}"
            engine.add(submit(name, prompt, count))
            expected[name] = alone(prompt, count)
        elif action == "abort" and engine.scheduler.requests and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(engine.scheduler.requests)))
            output = engine.abort(name)
            assert output is not None
            assert output.finish_reason == "abort"
            aborted.add(name)
        elif action == "preempt" and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
        elif action == "step" and engine.has_work:
            for output in engine.step()[0]:
                got.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    for name, outputs in run_to_end(engine).items():
        got.setdefault(name, []).extend(outputs)
    for name, tokens in expected.items():
        if name in aborted:
            assert tokens_of(got.get(name, [])) == tokens[: len(tokens_of(got.get(name, [])))]
        else:
            assert tokens_of(got[name]) == tokens
            assert [o.finish_reason for o in got[name]].count("length") == 1
            assert got[name][-1].finish_reason == "length"
    assert engine.scheduler.pool.num_used == 0
    assert engine.scheduler.pool.num_free == num_blocks - 1
    SEEN["preemptions"] += engine.scheduler.num_preemptions
    SEEN["prefix hits"] += engine.scheduler.prefix_hits
    SEEN["aborts"] += len(aborted)


def test_any_sequence_of_add_step_abort_preempt_keeps_blocks_accounted_and_tokens_unchanged() -> None:
    any_sequence_of_actions()
    assert all(count > 50 for count in SEEN.values()), f"the sequences must meet every case: {SEEN}"


class RememberingExecutor(SimulatedExecutor):
    """Keeps what a KV cache would keep: per slot, the tokens up to there. Asserts that what a step reads was written.

    A wrong prefix hit, a block given to two owners or a lost one shows as a slot with somebody else's tokens.
    """

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine.executor, SimulatedExecutor)
        super().__init__(engine.executor.config)
        self.block_size = engine.scheduler.block_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def execute(self, schedule: Schedule) -> list[StepResult]:
        for entry in schedule.entries:
            tokens, blocks = entry.request.tokens, entry.request.block_ids
            for p in range(entry.start, entry.start + entry.count):
                self.slots[blocks[p // self.block_size], p % self.block_size] = tuple(tokens[: p + 1])
        for entry in schedule.entries:
            tokens, blocks = entry.request.tokens, entry.request.block_ids
            for p in range(entry.start + entry.count):
                assert self.slots[blocks[p // self.block_size], p % self.block_size] == tuple(tokens[: p + 1])
        return super().execute(schedule)


def test_a_preempted_request_goes_before_those_that_waited() -> None:
    engine = make_engine(max_num_seqs=2)
    for name in ("first", "second", "third"):
        engine.add(submit(name, [1, 2, 3], 6))
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[-1])
    assert [request.id for request in engine.scheduler.waiting] == ["second", "third"]
    assert [output.request_id for output in engine.step()[0]] == ["first", "second"]


def test_out_of_blocks_the_youngest_is_preempted_and_all_finish_with_the_same_tokens() -> None:
    engine = make_engine(num_blocks=18, max_model_len=68)
    prompts = {f"r{i}": [i] * 20 for i in range(3)}
    for name, prompt in prompts.items():
        engine.add(submit(name, prompt, 40))
    outputs = run_to_end(engine)
    assert engine.scheduler.num_preemptions > 0
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == alone(prompt, 40)


def test_prompt_longer_than_the_budget_is_prefilled_in_chunks_beside_decodes() -> None:
    engine = make_engine(budget=8)
    engine.add(submit("short", [1, 2], 12))
    engine.step()
    engine.add(submit("long", list(range(50)), 2))
    steps_of_short = 0
    while "long" in engine.scheduler.requests:
        outputs, stats = engine.step()
        steps_of_short += any(o.request_id == "short" for o in outputs)
        assert stats.step_prompt_tokens + stats.step_generation_tokens <= 8 + 1
    assert steps_of_short >= 7, "the short request must go on decoding while the long one is prefilled"


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(10, 31))  # 21 tokens: five full blocks
    engine.add(submit("a", prompt))
    first = tokens_of(run_to_end(engine)["a"])
    engine.add(submit("b", prompt))
    outputs = run_to_end(engine)["b"]
    assert tokens_of(outputs) == first
    assert outputs[-1].num_cached_tokens == 20
    assert engine.scheduler.prefix_hits == 20


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(8))
    engine.add(submit("a", prompt))
    run_to_end(engine)
    engine.add(submit("b", prompt))
    assert run_to_end(engine)["b"][-1].num_cached_tokens == 4


def test_different_salts_share_no_blocks() -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(20))
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        request = submit(name, prompt)
        request.cache_salt = salt
        engine.add(request)
        outputs = run_to_end(engine)[name]
        assert outputs[-1].num_cached_tokens == (16 if name == "c" else 0)


def test_prefix_caching_can_be_switched_off() -> None:
    engine = make_engine(prefix=False)
    for name in "ab":
        engine.add(submit(name, list(range(20))))
        assert run_to_end(engine)[name][-1].num_cached_tokens == 0


def test_what_can_never_fit_is_refused_at_submit() -> None:
    engine = make_engine(num_blocks=5, block_size=4)  # 16 tokens of cache
    with pytest.raises(PromptTooLongError) as caught:
        engine.add(submit("r", [1] * 17, 1))
    assert (caught.value.length, caught.value.limit) == (17, 16)
    with pytest.raises(PromptTooLongError):
        engine.add(submit("r", [1] * 10, 7))
    engine.add(submit("r", [1] * 10, 6))
    assert len(tokens_of(run_to_end(engine)["r"])) == 6


def test_without_max_tokens_a_request_runs_to_the_context_limit() -> None:
    engine = make_engine(max_model_len=32)
    engine.add(submit("r", [1] * 10, max_tokens=None))  # type: ignore[arg-type]  # None is what we test
    outputs = run_to_end(engine)["r"]
    assert len(tokens_of(outputs)) == 22
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("token", [-1, 97, 2**31])
def test_prompt_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(InvalidParameterError, match="vocabulary"):
        make_engine().add(submit("r", [token]))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no tokens"):
        make_engine().add(submit("r", []))


def test_queue_is_bounded() -> None:
    engine = make_engine(max_num_seqs=2, queue=3)
    for i in range(5):
        engine.add(submit(f"r{i}", [1]))
    with pytest.raises(QueueFullError):
        engine.add(submit("one-too-many", [1]))
    assert len(run_to_end(engine)) == 5


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(submit("r", [1]))
    with pytest.raises(InvalidParameterError, match="in use"):
        engine.add(submit("r", [2]))


def test_abort_of_an_unknown_request_is_ignored() -> None:
    assert make_engine().abort("never-seen") is None


def test_stop_tokens_end_a_request_with_their_id_and_min_tokens_delays_them() -> None:
    tokens = alone([5, 6, 7], 8)
    engine = make_engine()
    engine.add(submit("r", [5, 6, 7], 8, stop_token_ids=(tokens[2],)))
    outputs = run_to_end(engine)["r"]
    assert tokens_of(outputs) == tokens[:3]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", tokens[2])
    engine.add(submit("s", [5, 6, 7], 8, stop_token_ids=(tokens[2],), min_tokens=4))
    assert len(tokens_of(run_to_end(engine)["s"])) > 3


def test_prompt_logprobs_cover_each_prompt_token_once_even_after_preemption() -> None:
    engine = make_engine(num_blocks=18, max_model_len=68, budget=7)
    for i in range(3):
        engine.add(submit(f"r{i}", [i] * 20, 40, prompt_logprobs=0))
    outputs = run_to_end(engine)
    assert engine.scheduler.num_preemptions > 0
    for name in ("r0", "r1", "r2"):
        scores = [score for output in outputs[name] for score in output.prompt_logprobs or []]
        assert scores[0] is None
        assert [score.token_id for score in scores[1:] if score] == [int(name[1])] * 19
