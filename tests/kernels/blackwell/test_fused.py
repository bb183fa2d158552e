"""Norms and activations that write the next linear's input quantised: the same bits as quantising it afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.paged_kv import allocate
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.blackwell.backend import BlackwellBackend
from nvfp4_runtime.kernels.ops import LinearKernel, LinearSpec, NormSpec, OpSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.layers.linear import Linear
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight
from tests.kernels.blackwell.conftest import Place
from tests.kernels.blackwell.emulated import EmulatedScaledMM
from tests.kernels.blackwell.test_linear import make, scaled_mm  # noqa: F401 - a fixture
from tests.kernels.conftest import random_nvfp4, random_tensor, same_bits
from tests.tiny import tiny_nvfp4_llama

EPS = 1e-5


class Here(BlackwellBackend):
    """The backend on this machine: its layers as tests make them."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.device)
        self._place = place

    def refuses(self, spec: OpSpec) -> str | None:
        takes = isinstance(spec, LinearSpec) and spec.numerics == "w4a4"
        return None if takes else "not in this test"

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        assert isinstance(weight, NVFP4Weight)
        return make(weight, self._place, spec.out_dtype, few=True)


def triton_here(place: Place) -> TritonBackend:
    found = TritonBackend()
    if found.missing is not None:
        pytest.skip(f"triton: {found.missing}")
    return found


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("m", "groups"), [(1, None), (5, (72, 56)), (67, None)])
def test_a_linear_takes_what_the_norm_wrote(scaled_mm: EmulatedScaledMM | None, place: Place, m, groups, few):  # noqa: F811
    hidden = 96
    weight = random_nvfp4(128, hidden, seed=3, groups=groups, bias=True, input_scale=3e-4)
    linear = make(weight, place, few=few)
    norm = triton_here(place).rms_norm(NormSpec(hidden, "bfloat16", "bfloat16"))
    x, residual = (random_tensor(m, hidden, seed=seed).to(place.device) for seed in (1, 2))
    gain = random_tensor(hidden, seed=4).to(place.device)
    normed, total = norm(x, residual.clone(), gain, EPS)
    assert linear.quantized_input_scale is not None
    rows, carried = norm.quantize(x, residual, gain, EPS, linear.quantized_input_scale, True)
    assert same_bits(carried.cpu(), total.cpu())
    assert same_bits(linear.multiply_quantized(rows).cpu(), linear(normed).cpu())


def test_padded_columns_keep_the_linear_s_own_quantiser(place: Place):
    assert make(random_nvfp4(32, 48, seed=1, input_scale=1e-3), place).quantized_input_scale is None


def test_a_model_with_fused_quantisation_gives_the_same_logits(
    scaled_mm: EmulatedScaledMM | None,  # noqa: F811
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = tiny_nvfp4_llama(tmp_path / "m")

    def logits() -> tuple[torch.Tensor, Kernels]:
        kernels = Kernels([Here(place), triton_here(place)], "bfloat16", "w4a4", "bfloat16", place.device)
        model = load_model(Checkpoint.open(folder), kernels, "auto", 32)
        on = place.device
        batch = ForwardBatch(
            input_ids=torch.tensor([5, 9, 6], device=on),
            positions=torch.arange(3, device=on),
            slot_mapping=torch.arange(16, 19, device=on),
            block_tables=torch.tensor([[1]], dtype=torch.int32, device=on),
            seq_lens=torch.tensor([3], dtype=torch.int32, device=on),
            cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32, device=on),
            logits_rows=torch.arange(3, device=on),
            kv=allocate(model.kv_specs, model.kv_dtype, 2, 16, on),
            max_query_len=3,
            max_seq_len=3,
        )
        with torch.inference_mode():
            return model.forward(batch).cpu(), kernels

    fused, kernels = logits()
    groups = [choice.group for choice in kernels.choices]
    for group in ("rms_norm -> qkv_proj", "rms_norm -> gate_up_proj", "silu_mul -> down_proj"):
        assert groups.count(group) == 2, groups  # two layers
    monkeypatch.setattr(Linear, "takes_quantized", None)
    apart, kernels = logits()
    assert not any("->" in choice.group for choice in kernels.choices)
    assert fused.isfinite().all()
    assert same_bits(fused, apart)
