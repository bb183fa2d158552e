"""A step's operations and bytes, against counting them one by one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from nvfp4_runtime.cache.specs import AttentionSpec, LatentSpec
from nvfp4_runtime.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from nvfp4_runtime.engine.cost import ModelCost, Work
from nvfp4_runtime.engine.messages import LayerGroup
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled
from nvfp4_runtime.engine.step_clock import StepClock


def config(**changes: object) -> ModelConfig:
    facts: dict[str, object] = {
        "architecture": "LlamaForCausalLM", "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 100,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope": RopeConfig(), "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig(**(facts | changes))  # type: ignore[arg-type]


SPECS = (AttentionSpec(2, 16), AttentionSpec(2, 16))  # 128 bytes a token and layer
LAYERS = [
    LayerGroup("qkv_proj", 2, "nvfp4", 4.5, 2 * 64 * 128 * 9 // 16, "cpu", "w4a16"),
    LayerGroup("lm_head", 1, "bf16", 16.0, 2 * 100 * 64, "cpu", "dense"),
    LayerGroup("norm", 5, "-", 0.0, 0, "cpu", "bfloat16"),
]


def schedule(*entries: tuple[int, int, bool]) -> Schedule:
    """Of (start, count, samples)."""
    return Schedule(tuple(Scheduled(SimpleNamespace(), start, count, samples) for start, count, samples in entries))  # type: ignore[arg-type]


def test_matrices_count_two_operations_per_weight_and_their_stored_bytes() -> None:
    cost = ModelCost.of(config(), LAYERS, SPECS, "bfloat16")
    assert cost.token_flops == 2 * 2 * 64 * 128
    assert cost.row_flops == 2 * 100 * 64
    assert cost.step_bytes == LAYERS[0].num_bytes
    work = cost.of_step(schedule((0, 3, False), (7, 1, True)))
    attention = 2 * 4 * 4 * 16 * ((1 + 2 + 3) + 8)
    assert work.flops == 4 * cost.token_flops + cost.row_flops + attention
    assert work.bytes_written == 4 * 256
    assert work.bytes_read == cost.step_bytes + cost.head_bytes + 256 * (3 + 8)


def test_a_step_without_rows_does_not_read_the_head_and_an_empty_one_reads_nothing() -> None:
    cost = ModelCost.of(config(), LAYERS, SPECS, "bfloat16")
    assert cost.of_step(schedule((0, 3, False))).bytes_read == cost.step_bytes + 3 * 256
    assert cost.of_step(schedule()) == Work()


def test_latent_attention_is_counted_over_the_latent_vector() -> None:
    mla = MLAConfig(None, kv_lora_rank=32, nope_dim=16, rope_dim=8, v_dim=16, interleaved=False, scale=1.0)
    cost = ModelCost.of(config(mla=mla), [], [LatentSpec(32, 8)] * 2, "bfloat16")
    work = cost.of_step(schedule((9, 1, False)))
    assert work.flops == 2 * 4 * 2 * (32 + 8 + 32) * 10
    assert work.bytes_written == 2 * 2 * (32 + 8)


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_bounds_what_each_token_sees(start: int, count: int, window: int) -> None:
    cost = ModelCost(pair_flops=1.0, kv_layer_bytes=1.0, windows={window: 1})
    work = cost.of_step(schedule((start, count, False)))
    seen = [set(range(max(0, p + 1 - window), p + 1)) for p in range(start, start + count)]
    assert work.flops == sum(len(each) for each in seen)
    assert work.bytes_read == len(set().union(*seen))


def test_of_routed_experts_a_token_computes_its_top_k_and_a_step_reads_those_it_touches() -> None:
    experts = LayerGroup("experts.down_proj", 2, "nvfp4", 4.5, 8 * 64 * 9 // 16, "cpu", "w4a16")
    moe = MoEConfig(num_experts=8, top_k=2, intermediate_size=16, layers=(True, True))
    cost = dataclasses.replace(ModelCost.of(config(moe=moe), [experts], SPECS, "bfloat16"), windows={})
    assert cost.token_flops == 2 * 8 * 64 / 4
    one, many = (cost.of_step(schedule((0, count, False))).bytes_read for count in (1, 200))
    assert one == pytest.approx(experts.num_bytes / 4)
    assert many == pytest.approx(experts.num_bytes)


def test_laps_leave_no_gap_and_what_precedes_the_start_counts_nowhere() -> None:
    moments = iter([0.0, 5.0, 6.0, 8.0, 8.5, 20.0, 21.0])
    clock = StepClock(lambda: next(moments))
    clock.start()
    clock.lap("schedule")
    clock.lap("model")
    clock.lap("model")
    clock.start()
    clock.lap("commit")
    assert clock.seconds == {"schedule": 1.0, "model": 2.5, "commit": 1.0}
