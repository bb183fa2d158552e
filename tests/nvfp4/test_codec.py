"""The codec, tested whole: every code, scale byte and midpoint; quantising against a second statement of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec
from tests.nvfp4 import restated

GRID = restated.GRID


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [256, 16] holding 0..15 in every row, and one scale byte per row: all 16 x 256 products."""
    codes = torch.arange(16, dtype=torch.uint8).expand(256, 16)
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1).view(torch.float8_e4m3fn)
    return codes, scales


def exact_products() -> np.ndarray:
    signed = [*GRID, *(-g for g in GRID)]
    return np.array([[v * restated.e4m3_value(b) for v in signed] for b in range(256)], dtype=np.float64)


def test_every_code_has_its_value_and_code_8_is_minus_zero():
    values = codec.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [*GRID, *(-g for g in GRID)]
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8


def test_every_code_times_every_scale_byte_dequantises_exactly():
    codes, scales = all_pairs()
    expected = exact_products()  # at most 6 significant bits, so float32 holds each one
    found = codec.dequantize(codec.pack_codes(codes), scales, torch.tensor(1.0)).numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert np.isnan(found[[0x7F, 0xFF]]).all()
    assert np.isfinite(np.delete(found, [0x7F, 0xFF], axis=0)).all()


def test_every_operand_is_exact_in_bfloat16():
    codes, scales = all_pairs()
    operand = codec.operand(codec.pack_codes(codes), scales)
    assert operand.dtype == torch.bfloat16
    np.testing.assert_array_equal(operand.to(torch.float64).numpy(), exact_products())


def test_dequantise_multiplies_the_two_scales_first():
    codes, scales = all_pairs()
    scale_2 = np.float32(0.00123)
    steps = np.array([restated.e4m3_value(b) for b in range(256)], dtype=np.float32) * scale_2
    values = np.array([*GRID, *(-g for g in GRID)], dtype=np.float32)
    found = codec.dequantize(codec.pack_codes(codes), scales, torch.tensor(scale_2))
    np.testing.assert_array_equal(found.numpy(), values * steps[:, None])


def test_dequantise_takes_one_scale_per_row():
    codes, scales = all_pairs()
    rows = torch.linspace(0.5, 2.0, 256)
    found = codec.dequantize(codec.pack_codes(codes)[:4], scales[40:44], rows[:4].unsqueeze(1))
    for i in range(4):
        one = codec.dequantize(codec.pack_codes(codes)[i : i + 1], scales[40 + i : 41 + i], rows[i])
        assert torch.equal(found[i : i + 1], one)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("midpoint", "winner"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_near_side(midpoint, winner, sign):
    at = torch.tensor(midpoint)
    below, above = (float(torch.nextafter(at, torch.tensor(to))) for to in (-math.inf, math.inf))
    lower, upper = max(g for g in GRID if g < midpoint), min(g for g in GRID if g > midpoint)
    codes = codec.encode_e2m1(sign * torch.tensor([midpoint, below, above]))
    assert codec.decode_e2m1(codes).tolist() == [sign * winner, sign * lower, sign * upper]


def test_every_grid_value_encodes_to_itself_and_larger_ones_saturate():
    values = torch.tensor([*GRID, *(-g for g in GRID)])
    assert codec.encode_e2m1(values).tolist() == list(range(16))
    beyond = torch.tensor([6.5, 1e30, math.inf, -7.0, -math.inf])
    assert codec.decode_e2m1(codec.encode_e2m1(beyond)).tolist() == [6.0, 6.0, 6.0, -6.0, -6.0]


def test_sign_of_zero_and_of_underflow_is_kept():
    assert codec.encode_e2m1(torch.tensor([0.0, -0.0, 0.1, -0.1, 1e-45, -1e-45])).tolist() == [0, 8, 0, 8, 0, 8]


def test_even_k_is_in_the_low_nibble_and_unpacking_inverts_packing():
    assert codec.pack_codes(torch.tensor([[0x1, 0xE]], dtype=torch.uint8)).tolist() == [[0xE1]]
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    assert torch.equal(codec.pack_codes(codec.unpack_codes(every_byte)), every_byte)
    with pytest.raises(NVFP4ShapeError, match="odd number of codes"):
        codec.pack_codes(torch.zeros(2, 3, dtype=torch.uint8))


def test_a_block_of_zeros_stores_scale_one_and_keeps_signs():
    w = torch.zeros(1, 32)
    w[0, 1], w[0, 16] = -0.0, 3.0
    packed, scale = codec.quantize(w, codec.weight_scale_2(w.abs().max()))
    assert scale.view(torch.uint8).tolist() == [[0x38, 0x7E]]  # 1.0, and 448 for the block of the maximum
    assert codec.unpack_codes(packed)[0, :3].tolist() == [0, 8, 0]


def test_a_tiny_block_stores_the_smallest_scale():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16] = 1e-9, 1.0
    _, scale = codec.quantize(w, codec.weight_scale_2(w.abs().max()))
    assert scale.view(torch.uint8).tolist() == [[0x01, 0x7E]]


def test_a_block_beyond_scale_2_is_clamped_at_448_and_saturates():
    w = torch.full((1, 16), 100.0)
    packed, scale = codec.quantize(w, codec.weight_scale_2(torch.tensor(10.0)))
    assert scale.view(torch.uint8).tolist() == [[0x7E]]
    assert set(codec.unpack_codes(packed).flatten().tolist()) == {7}


def test_a_tensor_of_zeros_is_zero_again():
    packed, scale = codec.quantize(torch.zeros(2, 16), codec.weight_scale_2(torch.tensor(0.0)))
    assert not packed.any()
    assert scale.view(torch.uint8).tolist() == [[0x38], [0x38]]
    assert not codec.dequantize(packed, scale, torch.tensor(0.0)).any()


@pytest.mark.parametrize("k", [0, 1, 8, 15, 17, 24, 33])
def test_k_not_a_multiple_of_16_is_refused_saying_so(k):
    for quantise in (codec.quantize, codec.quantize_activation):
        with pytest.raises(NVFP4ShapeError, match=f"has {k} values; NVFP4 needs a positive multiple of 16"):
            quantise(torch.zeros(2, k), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_with_nan_or_inf_are_refused(bad):
    w = torch.ones(2, 32)
    w[1, 17] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        codec.quantize(w, torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(4))
def test_quantising_is_bit_equal_to_the_restated_recipe_on_bf16_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(48, 64, generator=generator) * 10.0 ** (-seed)).to(torch.bfloat16)
    w[0, :16] = 0
    w[1, :16] *= 1e-6
    scale_2 = codec.weight_scale_2(w.abs().max())
    assert scale_2.item() == np.float32(w.abs().max().item()) / np.float32(2688.0)
    packed, scale = codec.quantize(w, scale_2)
    codes, scale_bytes = restated.quantize(w.float().numpy(), np.float32(scale_2))
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), scale_bytes)
    np.testing.assert_array_equal(packed.numpy(), restated.pack(codes))


finite = st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=True)


@settings(max_examples=120, deadline=None)
@given(w=hnp.arrays(np.float32, (2, 32), elements=finite), shrink=st.sampled_from([1.0, 0.25, 3.0]))
def test_any_finite_weights_quantise_as_restated_and_dequantise_to_finite_values(w, shrink):
    """`shrink` stands for a fused sibling with another maximum. Beyond 1e38, 6 * step overflows in any float32 code."""
    w = np.clip(w, -1e38, 1e38).astype(np.float32)
    scale_2 = np.float32(np.abs(w).max() / np.float32(2688.0)) * np.float32(shrink)
    packed, scale = codec.quantize(torch.from_numpy(w), torch.tensor(scale_2))
    back = codec.dequantize(packed, scale, torch.tensor(scale_2))
    assert torch.isfinite(back).all()
    if scale_2 == 0:  # zeros, or denormals too small for any scale
        assert not back.any()
        assert (scale.view(torch.uint8) == 0x38).all()
        return
    codes, scale_bytes = restated.quantize(w, scale_2)
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), scale_bytes)
    np.testing.assert_array_equal(packed.numpy(), restated.pack(codes))


@settings(max_examples=60, deadline=None)
@given(
    w=hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(width=32)),
)
def test_any_weights_at_all_give_a_result_or_a_clear_refusal(w):
    tensor = torch.from_numpy(w)
    if w.shape[1] % 16:
        with pytest.raises(NVFP4ShapeError, match="multiple of 16"):
            codec.quantize(tensor, torch.tensor(1.0))
    elif not np.isfinite(w).all():
        with pytest.raises(ValueError, match="NaN or Inf"):
            codec.quantize(tensor, torch.tensor(1.0))
    else:
        packed, scale = codec.quantize(tensor, codec.weight_scale_2(tensor.abs().max()))
        assert (scale.view(torch.uint8) < 0x7F).all()  # never NaN, never negative
        assert packed.shape == (w.shape[0], w.shape[1] // 2)


@settings(max_examples=120, deadline=None)
@given(
    x=hnp.arrays(np.float32, (2, 32), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=True)),
    amax=st.floats(2.0**-20, 1e4, width=32),
)
def test_any_activations_quantise_as_restated(x, amax):
    input_scale = np.float32(amax) / np.float32(2688.0)
    codes, scale = codec.quantize_activation(torch.from_numpy(x), torch.tensor(input_scale))
    expected_codes, expected_scale = restated.quantize_activation(x, input_scale)
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), expected_scale)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)


def test_bf16_activations_quantise_as_restated_and_their_operand_is_exact():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    x[3, :16] = 0
    input_scale = (x.abs().max().float() * 0.5) / 2688  # half the maximum: some blocks saturate
    codes, scale = codec.quantize_activation(x, input_scale)
    expected_codes, expected_scale = restated.quantize_activation(x.float().numpy(), np.float32(input_scale))
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), expected_scale)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    values = np.array([*GRID, *(-g for g in GRID)])[expected_codes]
    scales = np.array([restated.e4m3_value(b) for b in range(256)])[expected_scale].repeat(16, axis=1)
    np.testing.assert_array_equal(codec.activation_operand(x, input_scale).to(torch.float64).numpy(), values * scales)


def test_an_activation_block_that_underflows_gets_zero_codes():
    x = torch.full((1, 32), 1e-9)
    x[0, 16:] = 1.0
    codes, scale = codec.quantize_activation(x, torch.tensor(1.0 / 2688))
    assert scale.view(torch.uint8)[0, 0] == 0
    assert not codes[0, :16].any()


def test_activations_with_inf_saturate_and_nan_shows_in_the_block_scale():
    x = torch.ones(2, 16)
    x[0, 3], x[1, 3] = -math.inf, math.nan
    codes, scale = codec.quantize_activation(x, torch.tensor(1.0 / 2688))
    assert codes[0, 3] == 15
    assert scale.view(torch.uint8)[0, 0] == 0x7E
    assert torch.isnan(scale.to(torch.float32))[1, 0]


@pytest.mark.parametrize("name", ["modelopt-llama-nvfp4-kvfp8", "modelopt-llama-nvfp4-excluded"])
def test_requantising_modelopts_dequantised_weights_gives_back_its_codes_and_scales(shared, name):
    """A block whose largest code is 6 must come back bit for bit: amax = 6 * step, so step is found again."""
    stored = load_file(shared / "fixtures" / name / "model.safetensors")
    blocks = found = 0
    for key, w in load_file(shared / "fixtures" / name / "reference" / "dequant_weights.safetensors").items():
        module = key.removesuffix(".weight")
        packed, scale = codec.quantize(w, stored[f"{module}.weight_scale_2"])
        codes = codec.unpack_codes(stored[key]).reshape(w.shape[0], -1, 16)
        full = (codes & 7).amax(-1) == 7
        # ModelOpt's own dequantising dropped the sign of zero, so code 8 cannot come back from these files
        signed = torch.where(codes == 8, 0, codes)
        assert torch.equal(codec.unpack_codes(packed).reshape(codes.shape)[full], signed[full])
        ours, theirs = scale.view(torch.uint8), stored[f"{module}.weight_scale"].view(torch.uint8)
        assert torch.equal(ours[full], theirs[full])
        blocks += full.numel()
        found += int(full.sum())
    assert found > 0.99 * blocks  # rounding the scale moves amax / step by at most 1/16, from 6 to no less than 5.6
