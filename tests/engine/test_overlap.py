"""The overlapped engine over a device that lags gives the plain engine's outputs, whatever is asked of it and when."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.engine.device_runner import Capacity, DeviceRunner
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.graphs import capture_sizes
from nvfp4_runtime.engine.messages import Submit, TokenOutput
from nvfp4_runtime.engine.overlap import OverlappedEngine
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.sampling.on_device import TorchSampler
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.structured.thinking import ThinkingBudget, ThinkingSpan
from tests.engine.helpers import make_engine, submit, tokens_of
from tests.engine.twin import HashModel, TwinDevice

VOCABULARY, EOS, POISON = 97, 5, 96


def parts(options: dict[str, Any]) -> tuple[Engine, HashModel]:
    """A simulated engine, for its info and limits, and the model that replaces its executor."""
    return make_engine(**options), HashModel(VOCABULARY, POISON)


def plain_engine(options: dict[str, Any]) -> Engine:
    base, model = parts(options)
    runner = ModelRunner(model, model.cache(base.info.num_blocks, base.info.block_size), BatchSampler())
    return Engine(fresh_scheduler(base), runner, with_eos(base))


def overlapped_engine(options: dict[str, Any], lag: str, graphs: bool, seed: int = 0) -> OverlappedEngine:
    base, model = parts(options)
    info, device = base.info, TwinDevice(lag, seed)
    capacity = Capacity(info.max_num_batched_tokens, info.max_num_seqs, info.max_model_len, VOCABULARY)
    kv = model.cache(info.num_blocks, info.block_size)
    runner = DeviceRunner(model, kv, BatchSampler(), device, TorchSampler(), capacity)
    if graphs:
        runner.capture(capture_sizes(min(info.max_num_seqs, info.max_num_batched_tokens)), lambda _: None)
    engine = OverlappedEngine(fresh_scheduler(base), runner, with_eos(base))
    engine.twin = device  # type: ignore[attr-defined]  # for tests that count
    return engine


def fresh_scheduler(base: Engine) -> Scheduler:
    old = base.scheduler
    return Scheduler(old.config, BlockPool(base.info.num_blocks), old.block_size, old.enable_prefix_caching)


def with_eos(base: Engine) -> Any:
    base.info.eos_token_ids = [EOS]
    return base.info


@dataclass
class Workload:
    """What happens before which turn."""

    arrivals: dict[int, list[Submit]] = field(default_factory=dict)
    aborts: dict[int, list[str]] = field(default_factory=dict)
    preemptions: set[int] = field(default_factory=set)

    @classmethod
    def random(cls, draw: random.Random, max_model_len: int) -> Workload:
        work = cls()
        for i in range(draw.randint(6, 14)):
            length = draw.randint(1, max_model_len // 2)
            start = [draw.randrange(2)] * min(length, draw.randint(0, 20))  # few beginnings: prefixes are shared
            prompt = start + [draw.randrange(6, 90) for _ in range(length - len(start))]
            turn = draw.randint(0, 25)
            work.arrivals.setdefault(turn, []).append(submit(f"r{i}", prompt, **random_params(draw)))
            if draw.random() < 0.25:
                work.aborts.setdefault(turn + draw.randint(0, 12), []).append(f"r{i}")
        work.preemptions = {draw.randint(1, 40) for _ in range(draw.randint(0, 4))}
        return work


def random_params(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"max_tokens": draw.randint(1, 24)}
    if draw.random() < 0.5:
        found |= {"temperature": draw.choice([0.3, 1.0, 1.7]), "seed": draw.randrange(1000)}
        found |= draw.choice([{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.9, "top_k": 20}])
    # most requests are plain, so that steps overlap; some want the host
    found |= draw.choice([{}] * 8 + [{"logprobs": 2}, {"prompt_logprobs": 1}, {"presence_penalty": 1.5}])
    found |= draw.choice([{}] * 4 + [{"min_tokens": min(3, found["max_tokens"])}, {"logit_bias": {7: 5.0}}])
    found |= draw.choice([{}, {"ignore_eos": True}, {"stop_token_ids": (20, 30, 40)}])
    if draw.random() < 0.3:
        found["thinking"] = random_budget(draw)
    return found


def random_budget(draw: random.Random) -> ThinkingBudget:
    """Markers short enough to be met by chance, in any shape there is."""
    closes = draw.choice([(50,), (50, 51)])
    ending = draw.choice([closes, (*closes, 52, 53)])
    blanks = draw.choice([None, (), tuple(range(0, 90, 2))])
    span = ThinkingSpan((9,), closes, draw.random() < 0.7, blanks)
    return ThinkingBudget(span, draw.choice([0, 1, 2, 5, 11]), ending)


def run(engine: Engine, work: Workload) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    last = max([*work.arrivals, *work.aborts, *work.preemptions])
    turn = 0
    while turn <= last or engine.has_work:
        for one in work.arrivals.get(turn, []):
            engine.add(one)
        for name in work.aborts.get(turn, []):
            if (output := engine.abort(name)) is not None:
                outputs.setdefault(name, []).append(output)
        if turn in work.preemptions and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
        if engine.has_work:
            for output in engine.step()[0]:
                outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
        pool = engine.scheduler.pool
        assert pool.num_free + pool.num_used == pool.total
        turn += 1
        assert turn < 5000, "the engine does not come to an end"
    assert engine.scheduler.pool.num_used == 0
    return outputs


def essence(outputs: list[TokenOutput]) -> dict[str, Any]:
    """What a client sees, whichever turn brought it."""
    return {
        "tokens": tokens_of(outputs),
        "logprobs": [entry for output in outputs for entry in output.logprobs or []],
        "prompt_logprobs": [entry for output in outputs for entry in output.prompt_logprobs or []],
        "end": [(o.finish_reason, o.stop_reason, o.error) for o in outputs if o.finish_reason is not None],
    }


def assert_same_or_aborted(found: list[TokenOutput], expected: list[TokenOutput]) -> None:
    ends = {outputs[-1].finish_reason for outputs in (found, expected)}
    ours, theirs = essence(found), essence(expected)
    if "abort" not in ends:
        assert ours == theirs
        return
    for key in ("tokens", "logprobs", "prompt_logprobs"):  # the abort came at another moment; until then, the same
        shorter = min(len(ours[key]), len(theirs[key]))
        assert ours[key][:shorter] == theirs[key][:shorter]


SEEN: Counter[str] = Counter()


@pytest.mark.parametrize("seed", range(60))
def test_random_workloads_give_the_plain_engines_outputs(seed: int) -> None:
    draw = random.Random(seed)
    options = {
        "num_blocks": draw.choice([18, 20, 24, 65]),
        "budget": draw.choice([3, 8, 24, 64]),
        "max_num_seqs": draw.choice([2, 3, 6, 9]),
        "prefix": draw.random() < 0.7,
        "max_model_len": 64,
    }
    work = Workload.random(draw, 64)
    budgets = {one.request_id: one.params.thinking for arrived in work.arrivals.values() for one in arrived}
    expected = run(plain_engine(options), work)
    engine = overlapped_engine(options, draw.choice(["none", "most", "random"]), draw.random() < 0.6, seed)
    found = run(engine, work)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same_or_aborted(found[name], expected[name])
        SEEN[str(found[name][-1].finish_reason)] += 1
        SEEN["logprobs"] += found[name][-1].logprobs is not None
        SEEN["spent budgets"] += 50 in tokens_of(found[name]) and budgets[name] is not None
    SEEN["preemptions"] += engine.scheduler.num_preemptions
    SEEN["prefix hits"] += engine.scheduler.prefix_hits
    SEEN["graph steps"] += engine.twin.num_replayed  # type: ignore[attr-defined]  # put there above


def test_the_random_workloads_met_every_case() -> None:
    cases = (
        "stop",
        "length",
        "abort",
        "error",
        "logprobs",
        "preemptions",
        "prefix hits",
        "graph steps",
        "spent budgets",
    )
    missing = {case: SEEN[case] for case in cases if SEEN[case] < 10}
    assert not missing, f"met fewer than ten times: {missing}"


def roomy(lag: str = "most", graphs: bool = True) -> OverlappedEngine:
    return overlapped_engine({"max_model_len": 128}, lag, graphs)


def test_a_step_is_launched_before_the_one_before_it_is_read() -> None:
    engine = roomy()
    engine.add(submit("r", [10, 11, 12], 6, ignore_eos=True))
    came = [tokens_of(engine.step()[0]) for _ in range(7)]
    assert [len(tokens) for tokens in came] == [0, 1, 1, 1, 1, 1, 1]
    assert not engine.has_work


def test_no_step_runs_for_a_token_beyond_the_length_limit() -> None:
    engine = roomy()
    engine.add(submit("r", [10, 11, 12], 4, ignore_eos=True))
    launched = []
    launch = engine.executor.launch
    engine.executor.launch = lambda schedule: (launched.append(schedule.num_tokens), launch(schedule))[1]  # type: ignore[method-assign,func-returns-value]
    while engine.has_work:
        engine.step()
    assert launched == [3, 1, 1, 1]


def test_a_stop_token_is_seen_one_step_late_and_what_came_behind_it_is_dropped() -> None:
    plain = plain_engine({"max_model_len": 128})
    plain.add(submit("r", [10, 11, 12], 20, ignore_eos=True))
    tokens = []
    while plain.has_work:
        tokens += tokens_of(plain.step()[0])
    engine = roomy()
    engine.add(submit("r", [10, 11, 12], 20, ignore_eos=True, stop_token_ids=(tokens[3],)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()[0]
    assert tokens_of(outputs) == tokens[: tokens.index(tokens[3]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", tokens[3])
    assert engine.scheduler.pool.num_used == 0


def test_an_abort_frees_blocks_at_once_though_a_step_is_under_way() -> None:
    engine = roomy()
    engine.add(submit("r", [10] * 20, 50, ignore_eos=True))
    engine.add(submit("other", [11] * 9, 5, ignore_eos=True))
    engine.step()
    engine.step()
    used = engine.scheduler.pool.num_used
    output = engine.abort("r")
    assert output is not None
    assert output.finish_reason == "abort"
    assert engine.scheduler.pool.num_used < used
    rest = []
    while engine.has_work:
        rest += engine.step()[0]
        engine.scheduler.check()
    assert {output.request_id for output in rest} == {"other"}
    assert rest[-1].finish_reason == "length"


def test_a_step_whose_tokens_the_host_chooses_is_read_before_the_next_is_scheduled() -> None:
    engine = roomy()
    engine.add(submit("r", [10, 11, 12], 4, logprobs=1, ignore_eos=True))
    came = []
    while engine.has_work:
        came.append(len(tokens_of(engine.step()[0])))
    assert came == [0, 1, 1, 1, 1]


def test_an_aborted_last_request_leaves_a_step_that_is_still_read() -> None:
    engine = roomy()
    engine.add(submit("r", [10, 11], 9))
    engine.step()
    engine.abort("r")
    assert engine.has_work
    assert engine.step()[0] == []
    assert not engine.has_work


def test_a_request_id_may_be_used_again_while_its_last_step_is_under_way() -> None:
    engine = roomy()
    engine.add(submit("r", [10, 11], 30, ignore_eos=True))
    engine.step()
    engine.abort("r")
    engine.add(submit("r", [40, 41, 42], 3, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()[0]
    plain = plain_engine({"max_model_len": 128})
    plain.add(submit("r", [40, 41, 42], 3, ignore_eos=True))
    expected = []
    while plain.has_work:
        expected += plain.step()[0]
    assert tokens_of(outputs) == tokens_of(expected)


def test_a_top_k_beyond_any_vocabulary_means_all_tokens() -> None:
    found = []
    for engine in (roomy(), plain_engine({"max_model_len": 128})):
        engine.add(submit("r", [10, 11], 12, temperature=1.0, seed=4, top_k=2**40, ignore_eos=True))
        outputs = []
        while engine.has_work:
            outputs += engine.step()[0]
        found.append(tokens_of(outputs))
    assert found[0] == found[1]
    assert len(found[0]) == 12
