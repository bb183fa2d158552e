"""All layers as one native call: the bits of the same ops called one by one, in every kind of batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype, KVDtype, Numerics
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.llama import Decoder
from tests.kernels.conftest import cpu_backend, same_bits
from tests.models.paged import PagedRunner
from tests.tiny import (
    deepseek_v3_config,
    glm4_moe_config,
    nemotron_h_config,
    qwen2_config,
    qwen2_moe_config,
    qwen3_config,
    random_tensors,
    tiny_nvfp4_llama,
    write_modelopt,
    write_plain,
)
from tests.tiny_families import gpt_oss_config

TOKENS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3)).tolist()
# new tokens per sequence and step: a prompt, its chunks beside decodes, decodes alone
STEPS: list[list[tuple[int, int]]] = [
    [(0, 37)],
    [(1, 5), (0, 1)],
    [(0, 1), (2, 64), (1, 1)],
    [(2, 1)],
    [(1, 1), (0, 1), (2, 3)],
]


def plain_qwen2(folder: Path) -> Path:
    config = qwen2_config()
    write_plain(folder, config, random_tensors(config))
    return folder


def packed_qwen3(folder: Path) -> Path:
    config = qwen3_config()
    write_modelopt(folder, config, random_tensors(config))
    return folder


def load(path: Path, numerics: Numerics, dtype: Dtype, kv_dtype: KVDtype, threads: int, fused: bool) -> Decoder:
    kernels = Kernels([cpu_backend(threads=threads)], dtype, numerics)
    model = load_model(Checkpoint.open(str(path)), kernels, kv_dtype)
    assert model.run_as_one is not None
    assert "decoder" in {choice.group for choice in kernels.choices}
    if not fused:
        model.run_as_one = None
    return model


def all_logits(model: Decoder) -> list[torch.Tensor]:
    runner, found, at = PagedRunner(model), [], 0
    for step in STEPS:
        pieces = []
        for seq, count in step:
            pieces.append((seq, TOKENS[at : at + count]))
            at += count
        found.append(model.forward(runner.batch(pieces)))
    return found


@pytest.mark.parametrize("make", [tiny_nvfp4_llama, plain_qwen2, packed_qwen3])
@pytest.mark.parametrize(
    ("numerics", "dtype", "kv_dtype"),
    [
        ("w4a16", "bfloat16", "bfloat16"),
        ("w4a8", "bfloat16", "fp8"),
        ("w4a4", "bfloat16", "bfloat16"),
        ("w4a16", "float32", "float32"),
    ],
)
def test_one_call_gives_the_bits_of_the_ops_one_by_one(
    tmp_path: Path, make: Callable[[Path], Path], numerics: Numerics, dtype: Dtype, kv_dtype: KVDtype
) -> None:
    path = make(tmp_path)
    fused = all_logits(load(path, numerics, dtype, kv_dtype, 2, fused=True))
    for one_call, one_by_one in zip(
        fused, all_logits(load(path, numerics, dtype, kv_dtype, 1, fused=False)), strict=True
    ):
        assert same_bits(one_call, one_by_one)


FAMILIES = {
    "qwen2_moe": qwen2_moe_config(),
    "glm4_moe": glm4_moe_config(),
    "deepseek_v3": deepseek_v3_config(),
    "nemotron_h": nemotron_h_config(),
    "gpt_oss": gpt_oss_config(),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("numerics", "dtype"), [("w4a16", "bfloat16"), ("w4a4", "bfloat16"), ("w4a16", "float32")])
def test_families_give_the_bits_of_their_ops_one_by_one(
    tmp_path: Path, family: str, numerics: Numerics, dtype: Dtype
) -> None:
    config = FAMILIES[family]
    write_modelopt(tmp_path, config, random_tensors(config))
    fused = load(tmp_path, numerics, dtype, dtype, 2, fused=True)  # type: ignore[arg-type]  # of KV, which has both
    apart = load(tmp_path, numerics, dtype, dtype, 1, fused=False)  # type: ignore[arg-type]
    for one_call, one_by_one in zip(all_logits(fused), all_logits(apart), strict=True):
        assert one_call.abs().max() > 0.01
        assert same_bits(one_call, one_by_one)


def test_a_decoder_with_states_refuses_a_batch_without_slots_and_one_with_other_caches(tmp_path: Path) -> None:
    config = nemotron_h_config()
    write_modelopt(tmp_path, config, random_tensors(config))
    model = load(tmp_path, "w4a16", "bfloat16", "bfloat16", 1, fused=True)
    batch = PagedRunner(model).batch([(0, TOKENS[:4])])
    with pytest.raises(KernelError, match=r"needs batch\.state_slots"):
        model.forward(replace(batch, state_slots=None))
    with pytest.raises(IndexError, match=r"state_slots\[0\] is 99"):
        model.forward(replace(batch, state_slots=torch.tensor([99])))
    with pytest.raises(KernelError, match="need as many KV caches"):
        model.forward(replace(batch, kv=batch.kv[:1]))


def test_layers_that_calibration_observes_run_op_by_op(tmp_path: Path) -> None:
    kernels = Kernels([cpu_backend()], "bfloat16", observe=lambda names, kernel: lambda x: kernel(x))  # type: ignore[arg-type,return-value]  # a wrapper without weight_bytes
    model = load_model(Checkpoint.open(str(tiny_nvfp4_llama(tmp_path))), kernels, "bfloat16")
    assert model.run_as_one is None
    assert "decoder" not in {choice.group for choice in kernels.choices}


def test_a_slot_outside_the_cache_is_refused(tmp_path: Path) -> None:
    model = load(tiny_nvfp4_llama(tmp_path), "w4a16", "bfloat16", "bfloat16", 2, fused=True)
    batch = PagedRunner(model).batch([(0, TOKENS[:4])])
    batch.slot_mapping[2] = 1 << 40
    with pytest.raises(IndexError, match=r"slot_mapping\[2\] is 1099511627776"):
        model.forward(batch)


def test_a_token_or_row_outside_is_refused(tmp_path: Path) -> None:
    model = load(tiny_nvfp4_llama(tmp_path), "w4a16", "bfloat16", "bfloat16", 2, fused=True)
    batch = PagedRunner(model).batch([(0, TOKENS[:4])])
    batch.input_ids[1] = -1
    with pytest.raises(IndexError, match=r"input_ids\[1\] is -1"):
        model.forward(batch)
    batch.input_ids[1] = 0
    batch.logits_rows[3] = 4
    with pytest.raises(IndexError, match=r"logits_rows\[3\] is 4"):
        model.forward(batch)


def test_a_cache_of_another_type_is_refused(tmp_path: Path) -> None:
    model = load(tiny_nvfp4_llama(tmp_path), "w4a16", "bfloat16", "bfloat16", 2, fused=True)
    model.kv_dtype = "float32"
    with pytest.raises(KernelError, match=r"kv.k: expected a contiguous torch.bfloat16 tensor"):
        model.forward(PagedRunner(model).batch([(0, TOKENS[:4])]))
