"""200 prompts on the default model: every token and logprob to the last bit, whatever the engine does with the request.

Half of them greedy, half sampled with a seed; short and of many lengths: what varies is the company, not the text.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.llm import Generation
from tests.conftest import DefaultModel

pytestmark = [pytest.mark.model]

NUM_PROMPTS = 200
LONGEST_PROMPT, MOST_TOKENS = 40, 7
Bits = list[tuple[list[int], list[float]]]


def prompts() -> list[list[int]]:
    """Token ids of ordinary vocabulary; every fourth prompt starts like the one before it."""
    draw = random.Random(7)
    found: list[list[int]] = []
    for i in range(NUM_PROMPTS):
        fresh = [draw.randrange(1000, 40000) for _ in range(draw.randint(1, LONGEST_PROMPT))]
        found.append(found[-1][:20] + fresh[:20] if i % 4 == 3 else fresh)
    return found


def params() -> list[SamplingParams]:
    draw = random.Random(8)
    shared: dict[str, Any] = {"ignore_eos": True, "logprobs": 0}
    return [
        SamplingParams(temperature=0.0, max_tokens=draw.randint(1, MOST_TOKENS), **shared)
        if i % 2
        else SamplingParams(temperature=1.0, top_p=0.95, seed=i, max_tokens=draw.randint(1, MOST_TOKENS), **shared)
        for i in range(NUM_PROMPTS)
    ]


def bits(results: list[Generation]) -> Bits:
    return [(r.token_ids, [entry.logprob for entry in r.logprobs]) for r in results]


def assert_same(found: Bits, expected: Bits) -> None:
    different = [i for i in range(NUM_PROMPTS) if found[i] != expected[i]]
    assert not different, f"{len(different)} of {NUM_PROMPTS} prompts differ, the first: {different[:5]}"


def load(model: DefaultModel, **options: Any) -> LLM:
    engine = LLM(model.nvfp4, max_model_len=64, **options)
    if {group.backend for group in engine.info.layers} != {"cpu"}:
        pytest.skip("the plain kernels are not batch invariant: build the extension (backend cpu)")
    return engine


@pytest.fixture(scope="module")
def alone(default_model: DefaultModel) -> Bits:
    """Each prompt with the engine to itself, nothing cached, nothing cut."""
    engine = load(default_model, enable_prefix_caching=False)
    expected = [bits(engine.generate([p], one))[0] for p, one in zip(prompts(), params(), strict=True)]
    assert len({tuple(tokens) for tokens, _ in expected}) > NUM_PROMPTS // 2, "the outputs must tell prompts apart"
    return expected


def test_batches_of_random_sizes_change_no_bit(default_model: DefaultModel, alone: Bits) -> None:
    engine = load(default_model, max_num_seqs=48, enable_prefix_caching=False)
    draw, found, at = random.Random(9), [], 0
    while at < NUM_PROMPTS:
        count = draw.choice([2, 3, 7, 16, 33, 48])
        found += bits(engine.generate(prompts()[at : at + count], params()[at : at + count]))
        at += count
    assert_same(found, alone)


def test_prefix_hits_change_no_bit(default_model: DefaultModel, alone: Bits) -> None:
    engine = load(default_model, max_num_seqs=32, num_blocks=800)
    first = engine.generate(prompts(), params())
    again = engine.generate(prompts(), params())
    assert sum(r.num_cached_tokens > 0 for r in again) > NUM_PROMPTS // 3
    assert_same(bits(first), alone)
    assert_same(bits(again), alone)


def test_prefill_in_small_chunks_changes_no_bit(default_model: DefaultModel, alone: Bits) -> None:
    engine = load(default_model, max_num_seqs=12, max_num_batched_tokens=13, enable_prefix_caching=False)
    assert_same(bits(engine.generate(prompts(), params())), alone)


def test_preemption_changes_no_bit(default_model: DefaultModel, alone: Bits) -> None:
    # small blocks, so that even short answers ask for another one
    options = {"block_size": 4, "num_blocks": 30, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    engine = load(default_model, **options, enable_prefix_caching=False)
    found = bits(engine.generate(prompts(), params()))
    assert engine.engine.scheduler.num_preemptions > 10
    assert engine.engine.scheduler.pool.num_used == 0
    assert_same(found, alone)
