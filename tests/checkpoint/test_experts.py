"""A mixture's experts, one canonical weight each, however the files spell and stack them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import InvalidScaleError, TensorShapeError, UnexpectedTensorError, UnsupportedFormatError
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from tests import dialects, tiny
from tests.checkpoint.test_dialects import effective
from tests.dialects import Matrix, Named

E, INNER, HIDDEN = 3, 64, 96
PREFIX = "model.layers.0.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Experts = list[dict[str, Matrix]]


def experts() -> Experts:
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return [
        {name: Matrix.random(*shape, seed=10 * e + i) for i, (name, shape) in enumerate(shapes.items())}
        for e in range(E)
    ]


EXPERTS = experts()


def each(write: Callable[[Matrix], Named], names: dict[str, str] | None = None) -> Named:
    """One module per expert and projection."""
    return {
        f".{e}.{(names or {}).get(name, name)}{suffix}": t
        for e, mats in enumerate(EXPERTS)
        for name, matrix in mats.items()
        for suffix, t in write(matrix).items()
    }


def stacks(write: Callable[[list[Matrix]], Named], interleaved: bool = False) -> Named:
    """gate_up_proj and down_proj, each written from its experts' matrices."""
    gate_up = [dialects.stacked_rows([m["gate_proj"], m["up_proj"]], interleaved) for m in EXPERTS]
    down = [m["down_proj"] for m in EXPERTS]
    named = {"gate_up_proj": gate_up, "down_proj": down}
    return {f".{name}{suffix}": t for name, mats in named.items() for suffix, t in write(mats).items()}


def turned(t: Tensor) -> Tensor:
    if t.dtype.itemsize == 1:
        return t.view(torch.uint8).transpose(1, 2).contiguous().view(t.dtype)
    return t.transpose(1, 2).contiguous()


def stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dtype == torch.float8_e4m3fn:
        return torch.stack([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)
    return torch.stack(tensors)


def nvfp4_stack(mats: list[Matrix], bmm: bool, one_scale: bool = False) -> Named:
    """ModelOpt: codes and block scales [E, K/2, N] and [E, K/16, N] for batched multiplication, or [E, N, ...]."""
    top = max(m.top for m in mats) - 7 if one_scale else None
    parts = [dialects.nvfp4_tensors(m, top) for m in mats]
    packed, scale = stack([p[0] for p in parts]), stack([p[1] for p in parts])
    scale_2 = torch.tensor(parts[0][2]) if one_scale else torch.tensor([p[2] for p in parts])
    return {
        "": turned(packed) if bmm else packed,
        "_weight_scale": turned(scale) if bmm else scale,
        "_weight_scale_2": scale_2,
        "_input_scale": torch.tensor(dialects.INPUT_SCALE),
    }


def ct_stack(mats: list[Matrix], weight: str, scale: str, global_scale: str, input_scale: str) -> Named:
    """compressed-tensors: a divisor for each half of gate_up, [E, 2]."""
    halves = 2 if mats[0].codes.shape[0] == 2 * INNER else 1
    packed, scales, divisors = [], [], []
    for m in mats:
        rows = m.codes.shape[0] // halves
        parts = [dialects.nvfp4_tensors(m.rows(slice(h * rows, (h + 1) * rows))) for h in range(halves)]
        packed.append(torch.cat([p[0] for p in parts]))
        scales.append(stack([p[1] for p in parts]).flatten(0, 1))
        divisors.append(torch.tensor([1 / p[2] for p in parts]))
    divisor = torch.stack(divisors)
    return {
        weight: stack(packed),
        scale: stack(scales),
        global_scale: divisor,
        input_scale: torch.full_like(divisor, 1 / dialects.INPUT_SCALE),
    }


def gpt_oss(mats: list[Matrix]) -> Named:
    return {
        "_blocks": torch.stack([dialects.codec.pack_codes(m.codes).unflatten(1, (-1, 16)) for m in mats]),
        "_scales": torch.stack([(m.exponents + 127).to(torch.uint8) for m in mats]),
        "_bias": torch.stack([torch.arange(m.codes.shape[0]).bfloat16() + i for i, m in enumerate(mats)]),
    }


def plain_stack(mats: list[Matrix], bmm: bool) -> Named:
    values = torch.stack([m.value for m in mats]).bfloat16()
    return {"": turned(values) if bmm else values}


def fp8_stack(mats: list[Matrix], rows: int, bmm: bool, shape: Callable[[Tensor], Tensor]) -> Named:
    parts = [dialects.fp8_codes(m, rows or m.codes.shape[0], m.codes.shape[1]) for m in mats]
    codes = stack([p[0] for p in parts])
    return {"": turned(codes) if bmm else codes, "_weight_scale": shape(torch.stack([p[1] for p in parts]))}


MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CT_NAMES = ("_packed", "_scale", "_global_scale", "_input_global_scale")
CT_DOTTED = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
LAYOUTS: dict[str, tuple[Named, str, dict[str, Any]]] = {
    "modelopt, one by one": (each(dialects.modelopt), "nvfp4", {}),
    "modelopt, w1 w3 w2": (each(dialects.modelopt, MIXTRAL), "nvfp4", {}),
    "compressed-tensors, one by one": (each(dialects.compressed_tensors), "nvfp4", {}),
    "mxfp4, one by one": (each(dialects.mxfp4), "mxfp4", {}),
    "deepseek, one by one": (each(dialects.DEEPSEEK), "fp8", {}),
    "modelopt stack": (stacks(lambda m: nvfp4_stack(m, False)), "nvfp4", {}),
    "modelopt stack, turned (llama 4)": (stacks(lambda m: nvfp4_stack(m, True, one_scale=True)), "nvfp4", {}),
    "modelopt stack, turned and alternating": (
        stacks(lambda m: nvfp4_stack(m, True), interleaved=True),
        "nvfp4",
        {"model_type": "gpt_oss"},
    ),
    "compressed-tensors stack": (stacks(lambda m: ct_stack(m, *CT_NAMES)), "nvfp4", {}),
    "compressed-tensors stack, dotted": (stacks(lambda m: ct_stack(m, *CT_DOTTED)), "nvfp4", {}),
    "gpt-oss": (stacks(gpt_oss, interleaved=True), "mxfp4", {"model_type": "gpt_oss"}),
    "plain stack": (stacks(lambda m: plain_stack(m, False)), "bf16", {}),
    "plain stack, turned": (stacks(lambda m: plain_stack(m, True)), "bf16", {}),
    "plain stack, turned and alternating": (
        stacks(lambda m: plain_stack(m, True), interleaved=True),
        "bf16",
        {"model_type": "gpt_oss"},
    ),
    "fp8 stack, a scale per expert": (
        stacks(lambda m: fp8_stack(m, 0, False, lambda s: s.reshape(E, 1, 1))),
        "fp8",
        {},
    ),
    "fp8 stack, turned, a scale per row": (
        stacks(lambda m: fp8_stack(m, 1, True, lambda s: s.transpose(1, 2).contiguous())),
        "fp8",
        {},
    ),
    "fp8 stack, blocks of 32 rows": (stacks(lambda m: fp8_stack(m, 32, False, lambda s: s)), "fp8", {}),
}


def save(folder: Path, named: Named, section: Any = None, **config: Any) -> Checkpoint:
    whole = {**tiny.llama_config(), **config}
    if section is not None:
        whole["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(whole))
    tiny.save_shards(folder, {PREFIX + name: t for name, t in named.items()})
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_experts(tmp_path: Path, name: str) -> None:
    named, form, config = LAYOUTS[name]
    ckpt = save(tmp_path, named, **config)
    for projection in PROJECTIONS:
        n, k = EXPERTS[0][projection].codes.shape
        weights = ckpt.experts(PREFIX, projection, E, n, k)
        assert [w.format for w in weights] == [form] * E
        for e, weight in enumerate(weights):
            assert torch.equal(effective(weight), EXPERTS[e][projection].value), (projection, e)
            if isinstance(weight, NVFP4Weight):
                assert weight.input_scale == dialects.INPUT_SCALE
            if name == "gpt-oss":
                rows = torch.arange(n) if projection == "down_proj" else 2 * torch.arange(n) + (projection == "up_proj")
                assert weight.bias is not None
                assert torch.equal(weight.bias, rows.bfloat16() + e)
    ckpt.finish()


def spoiled(write: Callable[[Matrix], Named], suffix: str, values: dict[int, float | None]) -> Named:
    """gate_proj's scale `suffix` of some experts replaced, or (None) removed."""
    named = each(write)
    for e, value in values.items():
        key = f".{e}.gate_proj{suffix}"
        if value is None:
            del named[key]
        else:
            named[key] = torch.full_like(named[key], value)
    return named


@pytest.mark.parametrize("bad", [None, 0.0, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_an_expert_that_calibration_missed_gets_its_layer_s_largest_input_scale(
    tmp_path: Path, dialect: str, bad: float | None
) -> None:
    if dialect == "modelopt":
        named = spoiled(dialects.modelopt, ".input_scale", {0: 0.25, 1: bad, 2: 0.5})
    else:
        named = spoiled(dialects.compressed_tensors, ".input_global_scale", {0: 4.0, 1: bad, 2: 2.0})
    ckpt = save(tmp_path, named, dialects.section("NVFP4"))
    weights = ckpt.experts(PREFIX, "gate_proj", E, INNER, HIDDEN)
    assert [w.input_scale for w in weights if isinstance(w, NVFP4Weight)] == [0.25, 0.5, 0.5]
    found = [note for note in ckpt.notes if "experts without a usable input_scale" in note]
    assert len(found) == 1
    assert PREFIX in found[0]


def test_where_no_expert_has_an_input_scale_all_stay_weight_only(tmp_path: Path) -> None:
    ckpt = save(tmp_path, each(dialects.w4a16), dialects.section("NVFP4"))
    weights = ckpt.experts(PREFIX, "gate_proj", E, INNER, HIDDEN)
    assert all(isinstance(w, NVFP4Weight) and w.input_scale is None for w in weights)
    assert any("W4A4 is impossible" in note for note in ckpt.notes)


def test_a_container_in_quantized_layers_declares_its_experts(tmp_path: Path) -> None:
    layers = {PREFIX: {"quant_algo": "NVFP4", "group_size": 16}}
    section = dialects.section("MIXED_PRECISION", None, ignore=[], quantized_layers=layers)
    ckpt = save(tmp_path, each(dialects.modelopt), section)
    ckpt.experts(PREFIX, "up_proj", E, INNER, HIDDEN)
    assert ckpt.notes == ()


def test_a_wrong_number_of_experts_is_refused(tmp_path: Path) -> None:
    one_by_one, stacked = tmp_path / "a", tmp_path / "b"
    one_by_one.mkdir()
    stacked.mkdir()
    with pytest.raises(UnexpectedTensorError, match=r"experts\.2\.gate_proj"):
        save(one_by_one, each(dialects.modelopt)).experts(PREFIX, "gate_proj", E - 1, INNER, HIDDEN)
    with pytest.raises(TensorShapeError, match=r"expected U8 \[4, 128, 48\]"):
        save(stacked, LAYOUTS["modelopt stack"][0]).experts(PREFIX, "gate_proj", E + 1, INNER, HIDDEN)


def test_a_stack_is_no_single_matrix(tmp_path: Path) -> None:
    with pytest.raises(TensorShapeError, match=r"expected U8 \[96, 32\]"):
        save(tmp_path, LAYOUTS["modelopt stack"][0]).linear(f"{PREFIX}.down_proj", HIDDEN, INNER)


def test_fp8_blocks_across_the_cut_between_gate_and_up_are_refused(tmp_path: Path) -> None:
    named = stacks(lambda m: fp8_stack(m, 32, False, lambda s: s))
    cut = {name: t[:, :-1].contiguous() if "down" not in name and "scale" in name else t for name, t in named.items()}
    gate_up = named[".gate_up_proj"]
    cut[".gate_up_proj"] = gate_up.view(torch.uint8)[:, :96].contiguous().view(gate_up.dtype)
    with pytest.raises(UnsupportedFormatError, match="cannot be cut"):
        save(tmp_path, cut).experts(PREFIX, "gate_proj", E, 48, HIDDEN)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
def test_an_unusable_weight_scale_of_one_expert_is_refused(tmp_path: Path, value: float) -> None:
    named = dict(LAYOUTS["compressed-tensors stack"][0])
    scale = named[".down_proj_global_scale"].clone()
    scale[1] = value
    with pytest.raises(InvalidScaleError, match=r"down_proj_global_scale"):
        save(tmp_path, named | {".down_proj_global_scale": scale}).experts(PREFIX, "down_proj", E, HIDDEN, INNER)


def test_a_pre_quant_scale_of_an_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="pre_quant_scale"):
        save(tmp_path, each(dialects.awq)).experts(PREFIX, "gate_proj", E, INNER, HIDDEN)


def test_experts_of_one_scale_share_the_block(tmp_path: Path) -> None:
    """Cutting FP8 under one scale for the whole matrix leaves one scale for each half."""
    ckpt = save(tmp_path, LAYOUTS["fp8 stack, a scale per expert"][0])
    weight = ckpt.experts(PREFIX, "up_proj", E, INNER, HIDDEN)[1]
    assert isinstance(weight, FP8Weight)
    assert weight.block == (INNER, HIDDEN)
    assert weight.scale.numel() == 1
