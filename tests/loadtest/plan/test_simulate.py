"""The simulated replicas: tokens come when steps end, requests share steps, and a thousand replicas are cheap."""

from __future__ import annotations

import pytest

from loadtest.plan.pool import GrowingPool
from loadtest.plan.router import PIECE, Router
from loadtest.plan.simulate import Machine, Simulation, WordTokens
from loadtest.traffic.call import Call, Conversation
from loadtest.traffic.figures import SLO, figures
from loadtest.traffic.workloads import at_instants, conversations, find_workload, poisson
from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.engine.scheduler import Schedule


class Constant:
    """Steps of 10 ms, and 1 ms for each prompt token."""

    source = "made up"
    newcomer_seconds = 0.0

    def __init__(self) -> None:
        self.steps: list[int] = []

    def seconds(self, schedule: Schedule) -> float:
        self.steps.append(schedule.num_tokens)
        return 0.01 + 0.001 * sum(entry.count for entry in schedule.entries if entry.count > 1)


def machine(**changes) -> Machine:
    limits = {
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16, "kv_tokens": 4096, "max_model_len": 1024,
    }  # fmt: skip
    return Machine(Constant(), **(limits | changes))


def talk(words: int, answer: int, at: float = 0.0, first: str = "a") -> Conversation:
    return Conversation((Call((("user", " ".join(f"{first}{i}" for i in range(words))),), answer),), at=at)


def test_one_request_takes_its_steps():
    result = Simulation(machine(front_seconds=0.5), 1, [talk(19, 5, at=1.0)], WordTokens()).run()
    (outcome,) = result.outcomes
    assert outcome.failure is None
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (20, 5)  # and one for the role
    assert outcome.ttft == pytest.approx(0.5 + 0.01 + 0.020)
    assert outcome.gaps == pytest.approx([0.01] * 4)
    assert result.seconds == pytest.approx(1.57)
    assert result.busy == pytest.approx(0.07 / 1.57)


def test_who_comes_while_a_step_runs_makes_it_longer():
    box = machine(front_seconds=0.001)
    box.times.newcomer_seconds = 0.003
    talks = [
        talk(1, 5),
        talk(1, 2, at=0.015, first="b"),
    ]  # 2 tokens of prompt: a first step of 12 ms, of which at 15 ms
    one, two = Simulation(box, 1, talks, WordTokens()).run().outcomes
    assert one.gaps == pytest.approx([0.013, 0.012, 0.010, 0.010])  # the second had the newcomer, the third its prompt
    assert two.arrivals[0] == pytest.approx(one.arrivals[2])


def test_a_long_prompt_is_cut_into_chunks_by_the_real_scheduler():
    box = machine()
    Simulation(box, 1, [talk(149, 2)], WordTokens()).run()
    assert box.times.steps == [64, 64, 22, 1]


def test_more_than_fit_a_step_wait_for_their_turn():
    result = Simulation(machine(), 1, [talk(2, 10, first=str(i)) for i in range(8)], WordTokens()).run()
    firsts = sorted(outcome.ttft for outcome in result.outcomes)
    assert firsts[3] < 0.04  # four begin together, or nearly: the first one found the engine idle
    assert firsts[4] > 0.1  # the others after those have ended


def test_a_closed_loop_has_as_many_out_as_users():
    result = Simulation(machine(), 1, [talk(2, 3, first=str(i)) for i in range(6)], WordTokens(), users=2).run()
    assert [outcome.due for outcome in result.outcomes[:2]] == [0.0, 0.0]
    ends = sorted(outcome.ended for outcome in result.outcomes)
    assert sorted(outcome.due for outcome in result.outcomes[2:]) == pytest.approx(ends[:4])


def test_turns_follow_each_other_and_find_their_prefix():
    first = Call((("user", " ".join(f"w{i}" for i in range(63))),), 4)
    second = Call((*first.messages, ("assistant", "b"), ("user", "c")), 4)
    result = Simulation(machine(), 1, [Conversation((first, second), think_seconds=1.0)], WordTokens()).run()
    one, two = result.outcomes
    assert two.due == pytest.approx(one.ended + 1.0)
    assert two.cached_tokens == 64


def test_what_cannot_fit_fails_and_is_said():
    talks = [talk(2000, 2), *(talk(2, 50) for _ in range(6))]
    result = Simulation(machine(max_waiting=0), 1, talks, WordTokens()).run()
    found = figures(result.outcomes, SLO())
    assert found.failures == {"2001 + 2 tokens exceed 1024": 1, "HTTP 429": 2}


def test_blocks_that_run_out_are_preempted_and_everything_ends():
    box = machine(kv_tokens=160, max_model_len=160)
    result = Simulation(box, 1, [talk(15, 60, first=str(i)) for i in range(4)], WordTokens()).run()
    assert result.preemptions > 0
    assert [outcome.completion_tokens for outcome in result.outcomes] == [60] * 4


def test_the_same_answer_comes_from_any_number_of_tries():
    talks = at_instants(conversations(find_workload("chat").scaled(0.2), "x"), poisson(20, 2, "x"))
    one, two = (figures(Simulation(machine(), 2, talks, WordTokens()).run().outcomes, SLO()) for _ in range(2))
    assert one == two


def test_a_thousand_replicas_serve_what_one_cannot():
    talks = [talk(20, 4, at=0.001 * i, first=str(i)) for i in range(300)]
    alone = figures(Simulation(machine(), 1, talks, WordTokens()).run().outcomes, SLO())
    many = Simulation(machine(), 1000, talks, WordTokens()).run()
    found = figures(many.outcomes, SLO())
    assert found.ttft is not None
    assert alone.ttft is not None
    assert found.ttft.p99 == pytest.approx(0.01 + 0.021)  # nobody meets anybody
    assert alone.ttft.p99 > 10 * found.ttft.p99


def test_words_become_tokens_at_the_measured_rate():
    tokens = WordTokens(template=10, per_word=1.5)
    assert len(tokens((("user", "a b c d"),))) == 10 + 1 + 6
    assert tokens((("user", "a b"),)) == tokens((("user", "a b"),))
    assert tokens((("user", "a b"),)) != tokens((("user", "a c"),))


def test_the_router_keeps_what_belongs_together_until_that_costs_more():
    router = Router(3)
    shared = list(range(10 * PIECE))
    chosen, work = router.choose([*shared, 1])
    router.answered(chosen, work)
    again, work = router.choose([*shared, 2])
    assert (again, work) == (chosen, 1.0)
    other, _ = router.choose([7] * 5)
    assert other != chosen  # which is the busiest now
    for i in range(100):  # none of which has ended
        router.choose([*shared, 100 + i])
    assert min(router.running) > 20


def test_a_growing_pool_behaves_like_one_that_has_all_blocks():
    whole, growing = BlockPool(2000), GrowingPool(2000)
    assert growing.num_free == whole.num_free == 1999
    held = growing.allocate(900)
    assert len(set(held)) == 900
    growing.publish(held[0], b"x")
    growing.release(held)
    assert growing.num_free == 1999
    taken = growing.allocate(1998)  # what is cached is forgotten last
    assert growing.find([b"x"]) == [held[0]]
    growing.check([taken])
    assert growing.allocate(1) == [held[0]]
    assert growing.num_free == 0
