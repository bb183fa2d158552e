"""Requests that want hidden states: equal to transformers' however they are computed, beside ones that generate."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Pooling, Submit
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine import helpers
from tests.engine.helpers import make_engine, run_to_end, tokens_of
from tests.tiny import tiny_llama

PROMPTS = [[7] * 3, list(range(10, 50)), [300, 5, 9], list(range(10, 45)), [1], list(range(200, 263))]


def pool(request_id: str, prompt: list[int], pooling: Pooling) -> Submit:
    return Submit(request_id, prompt, SamplingParams(max_tokens=1), time.monotonic(), pooling=pooling)


def vectors(engine: Engine, prompts: list[list[int]], pooling: Pooling) -> list[np.ndarray]:
    for i, prompt in enumerate(prompts):
        engine.add(pool(str(i), prompt, pooling))
    outputs = run_to_end(engine)
    found = []
    for i in range(len(prompts)):
        (output,) = outputs[str(i)]
        assert (output.token_ids, output.finish_reason) == ([], "stop")
        assert output.embedding is not None
        found.append(np.frombuffer(output.embedding, dtype=np.float32))
    return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A float32 model folder and transformers' hidden states (after the final norm) of each prompt, [T, hidden]."""
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama(tmp_path_factory.mktemp("tiny") / "model", seed=3)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = [model(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in PROMPTS]
    return folder, states


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("budget", [1024, 16])
def test_vectors_equal_transformers_whole_and_chunked(
    case: tuple[Path, list[np.ndarray]], pooling: Pooling, budget: int
) -> None:
    folder, states = case
    engine = build_engine(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            cache=CacheConfig(num_blocks=65),
            scheduler=SchedulerConfig(max_num_batched_tokens=budget),
        )
    )
    engine.add(helpers.submit("beside", [5, 6, 7], 30))  # one that generates, in the same steps
    found = vectors(engine, PROMPTS, pooling)
    for vector, hidden in zip(found, states, strict=True):
        expected = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
        expected = expected / np.linalg.norm(expected)
        # float32 throughout, K <= 128 and two layers: a few hundred roundings of 6e-8
        np.testing.assert_allclose(vector, expected, atol=2e-5)
    again = vectors(engine, PROMPTS, pooling)  # now the prefix cache holds all of it
    assert all(np.allclose(a, b, atol=2e-5) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_preemption_and_chunks_do_not_change_a_vector(pooling: Pooling) -> None:
    prompts = [list(range(i, i + 40)) for i in range(4)]
    expected = vectors(make_engine(prefix=False), prompts, pooling)
    engine = make_engine(num_blocks=18, max_model_len=68, budget=24, prefix=False)
    engine.add(helpers.submit("beside", [1] * 20, 40))
    engine.step()
    found = vectors(engine, prompts, pooling)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(abs(float(np.linalg.norm(vector)) - 1) < 1e-5 for vector in found)


def test_a_mean_is_never_taken_over_what_the_prefix_cache_skipped() -> None:
    engine = make_engine()
    prompt = list(range(60))
    (first,) = vectors(engine, [prompt], "mean")
    hits = engine.scheduler.prefix_hits
    (second,) = vectors(engine, [prompt], "mean")
    assert engine.scheduler.prefix_hits == hits
    np.testing.assert_array_equal(first, second)
    (last,) = vectors(engine, [prompt], "last")
    assert engine.scheduler.prefix_hits > hits, "the last token's state needs the last token alone"
    assert not np.allclose(first, last)


def test_tokens_of_generating_requests_are_those_they_have_alone() -> None:
    alone = make_engine()
    alone.add(helpers.submit("a", [1, 2, 3], 20))
    expected = tokens_of(run_to_end(alone)["a"])
    engine = make_engine()
    engine.add(helpers.submit("a", [1, 2, 3], 20))
    for i in range(3):
        engine.add(pool(str(i), [i + 1] * 30, "mean"))
    assert tokens_of(run_to_end(engine)["a"]) == expected
