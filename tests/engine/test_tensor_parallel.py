"""Two and four ranks over gloo give the tokens of one process, for every family, however steps are cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.config import AdapterConfig, CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.leader import LOGITS, pack, unpack
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.engine.ranks import Ranks
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.sampling.params import SamplingParams
from tests import tiny
from tests.engine.helpers import run_to_end, submit, tokens_of
from tests.engine.rank_pool import RankPool

NEW_TOKENS = 10
PROMPTS = [[7] * 3, list(range(10, 50)), [300, 5, 9], list(range(10, 45)), [1], list(range(200, 263))]
# Wide enough for four ranks: a shared expert of 64 is four blocks of 16.
FAMILIES = {
    "llama": tiny.llama_config(),
    "llama, keys and values on two ranks each, tied head, biases": tiny.llama_config(
        num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": tiny.qwen2_config(),
    "qwen3": tiny.qwen3_config(),
    "mixtral": tiny.mixtral_config(),
    "qwen2_moe": tiny.qwen2_moe_config(shared_expert_intermediate_size=64),
    "qwen3_moe": tiny.qwen3_moe_config(),
    "glm4_moe": tiny.glm4_moe_config(moe_intermediate_size=64),
    "deepseek_v3": tiny.deepseek_v3_config(moe_intermediate_size=64),
    "deepseek_v3, one query projection": tiny.deepseek_v3_config(moe_intermediate_size=64, q_lora_rank=None),
    "nemotron_h": tiny.nemotron_h_config(n_groups=4),
}
WAYS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 9, "max_model_len": 96, "max_num_batched_tokens": 48},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    made = RankPool(4)
    yield made
    made.close()
    assert not made.deaths


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(folder: Path, size: int, **options: Any) -> EngineConfig:
    cache = {k: options.pop(k) for k in list(options) if k in CacheConfig.__dataclass_fields__}
    scheduler = {k: options.pop(k) for k in list(options) if k in SchedulerConfig.__dataclass_fields__}
    fixed: dict[str, Any] = {"dtype": "float32", "backend": "reference", "threads": 1}
    return EngineConfig(
        model=str(folder),
        cache=CacheConfig(**{"num_blocks": 65, **cache}),
        scheduler=SchedulerConfig(**scheduler),
        parallel=ParallelConfig(size=size),
        **{**fixed, **options},
    )


def greedy(pool: RankPool, config: EngineConfig) -> tuple[list[list[int]], int]:
    """Every prompt's tokens, and how many requests were preempted."""
    ranks = pool.ranks(config) if config.parallel.size > 1 else None
    engine = build_engine(config, ranks=ranks)
    for i, prompt in enumerate(PROMPTS):
        engine.add(submit(f"r{i}", prompt, NEW_TOKENS, min_tokens=NEW_TOKENS))
    outputs = run_to_end(engine)
    engine.close()
    assert engine.info.tensor_parallel_size == config.parallel.size
    return [tokens_of(outputs[f"r{i}"]) for i in range(len(PROMPTS))], engine.scheduler.num_preemptions


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_one_process(tmp_path: Path, pool: RankPool, family: str) -> None:
    config = FAMILIES[family]
    tiny.write_plain(tmp_path, config, tiny.random_tensors(config, seed=3), shards=2)
    expected, _ = greedy(pool, config_of(tmp_path, 1))
    for size, way in ((2, "preempted"), (4, "chunked")):
        found, num_preempted = greedy(pool, config_of(tmp_path, size, **WAYS[way]))
        assert found == expected, f"{size} ranks, {way}"
        assert (num_preempted > 0) == (way == "preempted")


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "nemotron_h"])
def test_tokens_equal_one_process_in_w4a4(tmp_path: Path, pool: RankPool, family: str) -> None:
    """Cuts lie between blocks of 16, so ranks quantise their activations to the very blocks that one process has."""
    config = FAMILIES[family]
    tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config, seed=3), share_scale_2=False)
    expected, _ = greedy(pool, config_of(tmp_path, 1, numerics="w4a4"))
    assert greedy(pool, config_of(tmp_path, 4, numerics="w4a4"))[0] == expected


def test_ranks_hold_parts_of_weights_and_caches_and_no_rank_the_whole(tmp_path: Path, pool: RankPool) -> None:
    config = tiny.llama_config()
    tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config, seed=3))
    whole = build_engine(config_of(tmp_path, 1))
    parted_config = config_of(tmp_path, 2)
    part = build_engine(parted_config, ranks=pool.ranks(parted_config))
    sizes = [{group.name: group.num_bytes for group in engine.info.layers} for engine in (whole, part)]
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"):
        scales = 4 * 16  # weight_scale_2 is on every rank
        assert sizes[1][name] <= sizes[0][name] / 2 + scales, name
    assert part.info.kv_bytes == whole.info.kv_bytes, "heads are split: all ranks together keep what one process keeps"
    part.close()


def test_a_request_means_the_same_whatever_else_it_asks_for(tmp_path: Path, pool: RankPool) -> None:
    """Prompt logprobs take all rows through the head, an embedding none; sampling happens on rank 0 alone."""
    folder = tiny.tiny_llama(tmp_path / "m", seed=5)
    results = []
    for size in (1, 2):
        config = config_of(folder, size)
        engine = build_engine(config, ranks=pool.ranks(config) if size > 1 else None)
        engine.add(submit("scored", list(range(30, 60)), 4, prompt_logprobs=2, logprobs=2))
        engine.add(submit("drawn", [3, 1, 4], 10, temperature=1.0, seed=11))
        engine.add(Submit("pooled", list(range(9)), SamplingParams(max_tokens=1), 0.0, pooling="mean"))
        results.append(run_to_end(engine))
        engine.close()
    one, two = results
    assert [tokens_of(two[name]) for name in ("scored", "drawn")] == [
        tokens_of(one[name]) for name in ("scored", "drawn")
    ]
    scores = [[s for o in found["scored"] for s in o.prompt_logprobs or [] if s is not None] for found in results]
    assert len(scores[1]) == 29
    assert [s.logprob for s in scores[1]] == pytest.approx([s.logprob for s in scores[0]], abs=1e-4)
    vectors = [
        torch.frombuffer(bytearray(found["pooled"][-1].embedding or b""), dtype=torch.float32) for found in results
    ]
    assert torch.allclose(*vectors, atol=1e-5)


def test_the_native_kernels_take_a_ranks_part_and_say_that_layers_run_one_by_one(
    tmp_path: Path, pool: RankPool, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.llama_config(dtype="bfloat16")
    tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config, seed=3))
    with caplog.at_level("INFO", "nvfp4_runtime.kernels.registry"):
        tokens, _ = greedy(pool, config_of(tmp_path, 2, dtype="bfloat16", backend="auto", device="cpu"))
    assert all(len(each) == NEW_TOKENS for each in tokens)
    assert "layers run op by op (tensor parallelism: 2 ranks" in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"adapters": (AdapterConfig("a", "/nowhere"),)}, "LoRA"),
        ({"model_impl": "transformers"}, "--model-impl"),
    ],
)
def test_what_a_team_cannot_do_is_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    folder = tiny.tiny_llama(tmp_path / "m")
    with pytest.raises(ConfigError, match=named):
        build_engine(config_of(folder, 2, **options), ranks=Ranks(lambda _: None, tmp_path / "store"))


def test_a_model_too_narrow_is_refused_with_what_is_too_few(tmp_path: Path) -> None:
    folder = tiny.tiny_llama(tmp_path / "m", num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2: there are only 1 query heads"):
        build_engine(config_of(folder, 2))  # a rank of its own: those of the pool would end


@pytest.mark.parametrize("num_seqs", [1, 3, 40])
def test_a_step_crosses_as_numbers_and_comes_out_the_same(num_seqs: int) -> None:
    tokens = 2 * num_seqs
    batch = ForwardBatch(
        input_ids=torch.arange(tokens),
        positions=torch.arange(tokens) % 7,
        slot_mapping=torch.arange(tokens) + 16,
        block_tables=torch.arange(num_seqs * 5, dtype=torch.int32).view(num_seqs, 5),
        seq_lens=torch.full((num_seqs,), 9, dtype=torch.int32),
        cu_seqlens_q=torch.arange(0, tokens + 1, 2, dtype=torch.int32),
        logits_rows=torch.arange(0, tokens, 2),
        kv=(),
        max_query_len=2,
        max_seq_len=9,
        state_slots=torch.arange(num_seqs) + 1 if num_seqs == 3 else None,
    )
    found = unpack(pack(LOGITS, batch), (), torch.device("cpu"))
    for name in ForwardBatch.__dataclass_fields__:
        sent, came = getattr(batch, name), getattr(found, name)
        if isinstance(sent, torch.Tensor):
            assert torch.equal(sent, came), name
            assert sent.dtype == came.dtype, name
        else:
            assert sent == came, name
