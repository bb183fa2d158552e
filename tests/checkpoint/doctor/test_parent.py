"""Fast decoding gives the codec's bits, and distances to a parent are what a plain computation gives."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_runtime.checkpoint.doctor import decode
from nvfp4_runtime.checkpoint.doctor.decode import matrix
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.parent import compare
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import stored_layer
from nvfp4_runtime.nvfp4 import codec, mx
from nvfp4_runtime.nvfp4.layouts import swizzle_scales
from tests.checkpoint.doctor.patients import UP, edit, found, sound

N, K = 40, 96


def weights(seed=0, shape=(N, K)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def nvfp4(prefix, w):
    scale_2 = codec.weight_scale_2(w.abs().max())
    packed, block = codec.quantize(w, scale_2)
    tensors = {f"{prefix}.weight": packed, f"{prefix}.weight_scale": block, f"{prefix}.weight_scale_2": scale_2}
    return tensors, codec.dequantize(packed, block, scale_2)


def compressed(prefix, w):
    divisor = (2688 / w.abs().max()).bfloat16().float()
    packed, block = codec.quantize(w, 1 / divisor)
    steps = (block.float() / divisor).repeat_interleave(16, dim=1)
    tensors = {
        f"{prefix}.weight_packed": packed,
        f"{prefix}.weight_scale": block,
        f"{prefix}.weight_global_scale": divisor.reshape(1),
    }
    return tensors, codec.decode_e2m1(codec.unpack_codes(packed)) * steps


def mxfp4(prefix, w):
    packed, scale = mx.quantize(w)
    tensors = {f"{prefix}.weight": packed, f"{prefix}.weight_scale": scale}
    return tensors, mx.MXFP4Weight(packed, scale).dequantize()


def fp8_rows(prefix, w):
    scale = w.float().abs().amax(dim=1, keepdim=True) / 448
    codes = (w.float() / scale).to(torch.float8_e4m3fn)
    return {f"{prefix}.weight": codes, f"{prefix}.weight_scale": scale}, codes.float() * scale


def fp8_tensor(prefix, w):
    scale = w.float().abs().max() / 448
    codes = (w.float() / scale).to(torch.float8_e4m3fn)
    return {f"{prefix}.weight": codes, f"{prefix}.weight_scale": scale}, codes.float() * scale


def fp8_blocks(prefix, w):
    scale = torch.tensor([[0.01, 0.02], [0.03, 0.04]])
    codes = (w.float() / 0.02).to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(128, dim=0)[: w.shape[0]].repeat_interleave(128, dim=1)[:, : w.shape[1]]
    return {f"{prefix}.weight": codes, f"{prefix}.weight_scale_inv": scale}, codes.float() * spread


FORMS = {
    "nvfp4": (nvfp4, (N, K)),
    "compressed-tensors": (compressed, (N, K)),
    "mxfp4": (mxfp4, (N, K)),
    "fp8 per row": (fp8_rows, (N, K)),
    "fp8 per tensor": (fp8_tensor, (N, K)),
    "fp8 blocks": (fp8_blocks, (200, 160)),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_decode_to_the_codecs_bits_in_any_chunks(tmp_path, monkeypatch, form):
    make, shape = FORMS[form]
    w = weights(shape=shape)
    tensors, expected = make("layer", w)
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"layer.weight": w}, tmp_path / "parent.safetensors")
    shards = Shards(_only(tmp_path, "model"))
    layer = matrix(shards, stored_layer(shards, "layer"))
    rows = torch.cat([layer.rows(i, i + 7) for i in range(0, layer.n, 7)])
    assert torch.equal(rows.view(torch.int32), expected.float().view(torch.int32))
    parent = Shards(_only(tmp_path, "parent"))
    noise = float((expected.double() - w.double()).square().sum())
    for chunk in (1 << 18, 64):
        monkeypatch.setattr(decode, "CHUNK_VALUES", chunk)
        result = compare(shards, stored_layer(shards, "layer"), parent)
        assert result.signal == pytest.approx(float(w.double().square().sum()), rel=1e-5)
        assert result.noise == pytest.approx(noise, rel=1e-5)
    assert result.sqnr_db == pytest.approx(10 * math.log10(result.signal / result.noise))
    assert result.relative_error == pytest.approx(math.sqrt(result.noise / result.signal))


def _only(folder, name):
    """A folder of that one file, as model.safetensors."""
    alone = folder / f"{name}-alone"
    alone.mkdir()
    (folder / f"{name}.safetensors").rename(alone / "model.safetensors")
    return alone


def test_the_report_lists_layers_worst_first(tmp_path):
    folder, parent = sound(tmp_path)

    def change(tensors):
        tensors[f"{UP}.weight"].view(-1)[:8] ^= 0x88  # the first block with its signs turned

    edit(folder, change)
    report = inspect(folder, parent)
    assert report.parent.compared[0] == UP
    layers = {layer.name: layer for layer in report.layers}
    ordered = [layers[name].sqnr_db for name in report.parent.compared]
    assert ordered == sorted(ordered)
    assert 18 < ordered[-1] < 24
    assert report.parent.missing == ()
    assert layers["lm_head"].sqnr_db is None


@pytest.mark.model
def test_the_default_model_is_sound_and_its_order_of_scales_can_be_seen(default_model, tmp_path):
    report = inspect(default_model.nvfp4, default_model.bf16)
    assert report.sound
    assert len(report.parent.compared) == 210
    assert 20 < report.parent.sqnr_db < 21
    folder = tmp_path / "swizzled"
    shutil.copytree(default_model.nvfp4, folder)

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("gate_proj.weight_scale", "up_proj.weight_scale")):  # whole tiles: the shape stays
                tensors[name] = swizzle_scales(tensor).reshape(tensor.shape)

    edit(folder, change)
    finding = found(inspect(folder), "scales-swizzled")
    assert (finding.severity, len(finding.layers) >= 58) == ("warning", True)
