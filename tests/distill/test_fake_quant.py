"""Rounding as arithmetic gives the reference quantiser's bits."""

import torch

from nvfp4_runtime.distill import fake_quant
from nvfp4_runtime.nvfp4 import codec


def test_every_midpoint_and_its_neighbours_round_as_the_reference_does():
    middles = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 100.0])
    below, above = torch.nextafter(middles, torch.tensor(-1.0)), torch.nextafter(middles, torch.tensor(1e9))
    y = torch.cat([middles, below, above, torch.linspace(0, 8, 4001)])
    y = torch.cat([y, -y])
    expected = codec.decode_e2m1(codec.encode_e2m1(y))
    found = fake_quant.round_e2m1(y)
    assert torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))


def test_activations_have_the_reference_operand_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator) * torch.logspace(-6, 3, 33).unsqueeze(1)
    x[3] = 0
    x[4, :16] = 1e30  # saturates its block's scale
    for value in (1e-4, 0.013, 1.0):
        scale = torch.tensor(value)
        for each in (x, x.to(torch.bfloat16)):
            assert torch.equal(fake_quant.activation_operand(each, scale), codec.activation_operand(each, scale))


def test_weights_have_the_reference_operand_bits():
    w = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    w[5, :16] = 0
    scale_2 = codec.weight_scale_2(w.abs().amax())
    packed, block_scale = codec.quantize(w, scale_2)
    expected = codec.operand(packed, block_scale).to(torch.float32)
    assert torch.equal(fake_quant.weight_operand(w, block_scale, scale_2), expected)
    assert torch.equal(fake_quant.max_block_scales(w, scale_2).view(torch.uint8), block_scale.view(torch.uint8))
