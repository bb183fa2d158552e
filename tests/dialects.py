"""One tiny Llama in every dialect, so that all must load to one answer, bit for bit.

Its matrices are E2M1 codes under powers of two, one per 32 weights. That fits every format without rounding: MXFP4 as
it is, NVFP4 with such block scales, FP8 and the plain types because a code has two significant bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.nvfp4 import codec, mx
from tests.tiny import LINEARS, llama_config, random_tensors, save_shards

Config = dict[str, Any]
Named = dict[str, Tensor]  # what follows a module's name -> tensor
E4M3 = torch.float8_e4m3fn
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
INPUT_SCALE = 0.015625
EXCLUDE = ["lm_head", "model.embed_tokens"]


@dataclass(frozen=True)
class Matrix:
    """codes uint8 [N, K], exponents int [N, K/32]: w = e2m1(code) * 2^exponent."""

    codes: Tensor
    exponents: Tensor

    @classmethod
    def random(cls, n: int, k: int, seed: int) -> Matrix:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.exp2(torch.randint(-2, 3, (n, 1), generator=generator).float())  # rows of different size
        packed, scale = mx.quantize(torch.randn(n, k, generator=generator) * k**-0.5 * spread)
        return cls(codec.unpack_codes(packed), scale.to(torch.int32) - mx.E8M0_BIAS)

    @property
    def value(self) -> Tensor:
        """fp32 [N, K], exact."""
        return codec.decode_e2m1(self.codes) * torch.exp2(self.exponents.repeat_interleave(32, 1).float())

    @property
    def top(self) -> int:
        return int(self.exponents.max())

    def rows(self, rows: slice) -> Matrix:
        return Matrix(self.codes[rows], self.exponents[rows])


def stacked_rows(parts: list[Matrix], interleaved: bool = False) -> Matrix:
    """The rows of both parts, one part above the other or alternating."""
    if interleaved:
        return Matrix(
            torch.stack([p.codes for p in parts], 1).flatten(0, 1),
            torch.stack([p.exponents for p in parts], 1).flatten(0, 1),
        )
    return Matrix(torch.cat([p.codes for p in parts]), torch.cat([p.exponents for p in parts]))


def nvfp4_tensors(m: Matrix, scale_2_exponent: int | None = None, group: int = 16) -> tuple[Tensor, Tensor, float]:
    """packed [N, K/2], block scales [N, K/group], weight_scale_2."""
    e = m.top - 7 if scale_2_exponent is None else scale_2_exponent
    scale = torch.exp2((m.exponents - e).float())
    return codec.pack_codes(m.codes), scale.repeat_interleave(32 // group, 1).to(E4M3), 2.0**e


def modelopt(m: Matrix) -> Named:
    packed, scale, scale_2 = nvfp4_tensors(m)
    return {
        ".weight": packed,
        ".weight_scale": scale,
        ".weight_scale_2": torch.tensor(scale_2),
        ".input_scale": torch.tensor(INPUT_SCALE),
    }


def w4a16(m: Matrix) -> Named:
    return without(modelopt(m), ".input_scale")


def old_shapes(m: Matrix) -> Named:
    """[1] for [], bfloat16 for float32, a leading 1 before the block scales."""
    named = modelopt(m)
    return named | {
        ".weight_scale": named[".weight_scale"].unsqueeze(0),
        ".weight_scale_2": named[".weight_scale_2"].reshape(1),
        ".input_scale": named[".input_scale"].bfloat16().reshape(1),
    }


def w4a8(m: Matrix) -> Named:
    packed, scale, scale_2 = nvfp4_tensors(m, group=32)
    return modelopt(m) | {".weight": packed, ".weight_scale": scale, ".weight_scale_2": torch.tensor(scale_2)}


def awq(m: Matrix, shift: int = 0) -> Named:
    """The input is multiplied by 2 or 1/2, block by block of columns, and the weight divided by it."""
    powers = (torch.arange(m.exponents.shape[1]) + shift) % 2 * 2 - 1
    packed, scale, scale_2 = nvfp4_tensors(Matrix(m.codes, m.exponents - powers))
    named = modelopt(m) | {".weight": packed, ".weight_scale": scale, ".weight_scale_2": torch.tensor(scale_2)}
    return named | {".pre_quant_scale": torch.exp2(powers.float()).repeat_interleave(32).bfloat16()}


def compressed_tensors(m: Matrix) -> Named:
    packed, scale, scale_2 = nvfp4_tensors(m)
    return {
        ".weight_packed": packed,
        ".weight_scale": scale,
        ".weight_global_scale": torch.tensor([1 / scale_2]),
        ".input_global_scale": torch.tensor([1 / INPUT_SCALE]),
    }


def mxfp4(m: Matrix) -> Named:
    return {
        ".weight_packed": codec.pack_codes(m.codes),
        ".weight_scale": (m.exponents + mx.E8M0_BIAS).to(torch.uint8),
    }


def fp8_codes(m: Matrix, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes, and scales [ceil(N / rows), ceil(K / columns)] that make them exact."""
    n, k = m.codes.shape
    exponent = m.exponents.repeat_interleave(32, 1)
    scales = torch.stack([torch.stack([b.max() for b in band.split(columns, 1)]) for band in exponent.split(rows)])
    scale = torch.exp2(scales.float() - 6)  # the largest value is 6 * 2^6 = 384
    spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    codes = (m.value / spread).to(E4M3)
    assert torch.equal(codes.float() * spread, m.value)
    return codes, scale


def fp8(rows: int, columns: int, name: str, shape: Callable[[Tensor], Tensor]) -> Callable[[Matrix], Named]:
    """FP8 under scales for `rows` x `columns` weights (0: all), named and shaped as asked."""

    def write(m: Matrix) -> Named:
        codes, scale = fp8_codes(m, rows or m.codes.shape[0], columns or m.codes.shape[1])
        return {".weight": codes, f".{name}": shape(scale)}

    return write


def plain(dtype: torch.dtype) -> Callable[[Matrix], Named]:
    def write(m: Matrix) -> Named:
        value = m.value.to(dtype)
        assert torch.equal(value.float(), m.value)
        return {".weight": value}

    return write


def without(named: Named, *suffixes: str) -> Named:
    return {suffix: t for suffix, t in named.items() if suffix not in suffixes}


@dataclass(frozen=True)
class Model:
    config: Config
    others: Named
    matrices: dict[str, Matrix]


def tiny_model(seed: int = 0) -> Model:
    """A Llama whose sizes leave ragged 128 x 128 blocks; embeddings and norms are multiples of 1/64."""
    config = llama_config(hidden_size=160, intermediate_size=288, head_dim=32, vocab_size=320)
    matrices: dict[str, Matrix] = {}
    others: Named = {}
    for i, (name, tensor) in enumerate(random_tensors(config, seed).items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEARS:
            matrices[module] = Matrix.random(*tensor.shape, seed=seed + i)
        else:
            others[name] = (tensor * 64).round() / 64
    return Model(config, others, matrices)


Writer = Callable[[Matrix], Named]


@dataclass(frozen=True)
class Dialect:
    """How to write the model: each matrix by `write` (or by module name), and what the two JSON files declare."""

    write: Writer | Callable[[str], Writer]
    section: Config | None = None
    record: Config | None = None
    by_name: bool = False
    dtype: torch.dtype = torch.bfloat16

    def save(self, folder: Path, model: Model, shards: int = 1, **config: Any) -> Path:
        folder.mkdir(parents=True)
        whole = {**model.config, **config}
        if self.section is not None:
            whole["quantization_config"] = self.section
        (folder / "config.json").write_text(json.dumps(whole))
        if self.record is not None:
            (folder / "hf_quant_config.json").write_text(
                json.dumps({"producer": PRODUCER, "quantization": self.record})
            )
        save_shards(folder, self.tensors(model), shards)
        return folder

    def tensors(self, model: Model) -> Named:
        tensors = {name: t.to(self.dtype) for name, t in model.others.items()}
        for module, matrix in model.matrices.items():
            write: Any = self.write(module) if self.by_name else self.write  # type: ignore[arg-type]  # by_name says
            tensors |= {module + suffix: t for suffix, t in write(matrix).items()}
        return tensors


def section(algo: str, group_size: int | None = 16, **more: Any) -> Config:
    groups = {} if group_size is None else {"group_0": {"weights": {"num_bits": 4, "group_size": group_size}}}
    base = {"quant_method": "modelopt", "quant_algo": algo, "ignore": EXCLUDE, "producer": PRODUCER}
    return {**base, **({"config_groups": groups} if groups else {}), **more}


def record(algo: str, group_size: int | None = 16, **more: Any) -> Config:
    base = {"quant_algo": algo, "kv_cache_quant_algo": None, "group_size": group_size, "exclude_modules": EXCLUDE}
    return {**base, **more}


def ct_args(bits: int, strategy: str, **more: Any) -> Config:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True, **more}


def ct_section(form: str, *groups: Config, ignore: tuple[str, ...] = ("lm_head",)) -> Config:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def ct_group(weights: Config, targets: tuple[str, ...] = ("Linear",), activations: Config | None = None) -> Config:
    return {"targets": list(targets), "weights": weights, "input_activations": activations, "output_activations": None}


NVFP4_ARGS = ct_args(4, "tensor_group", group_size=16)
LOCAL = {**NVFP4_ARGS, "dynamic": "local"}
PER_TENSOR = fp8(0, 0, "weight_scale", lambda s: s.reshape(()))
PER_ROW = fp8(1, 0, "weight_scale", lambda s: s.reshape(-1))
PER_BLOCK = fp8(128, 128, "weight_scale", lambda s: s[:, None, :, None].contiguous())
CT_PER_ROW = fp8(1, 0, "weight_scale", lambda s: s.bfloat16())
DEEPSEEK = fp8(128, 128, "weight_scale_inv", lambda s: s)
MIXED_LAYERS = {"q_proj": "FP8", "gate_proj": "W4A16_NVFP4", "down_proj": "NVFP4", "k_proj": "FP8_PB_WO"}
MIXED_WRITERS: dict[str | None, Writer] = {
    "FP8": PER_TENSOR,
    "W4A16_NVFP4": w4a16,
    "NVFP4": modelopt,
    "FP8_PB_WO": PER_BLOCK,
    None: plain(torch.bfloat16),
}


def mixed(module: str) -> Writer:
    return MIXED_WRITERS[MIXED_LAYERS.get(module.rpartition(".")[2])]


def quantized_layers(model: Model) -> Config:
    algos = {name: MIXED_LAYERS.get(name.rpartition(".")[2]) for name in model.matrices}
    return {name: {"quant_algo": algo, "group_size": 16} for name, algo in algos.items() if algo is not None}


def awq_apart(module: str) -> Writer:
    """q, k and v with different pre_quant_scales: they cannot share a kernel."""
    leaf = module.rpartition(".")[2]
    return lambda m: awq(m, shift=1 if leaf == "k_proj" else 0)


def dialects(model: Model) -> dict[str, Dialect]:
    """Every dialect by name."""
    mixed_section = section("MIXED_PRECISION", None, ignore=[], quantized_layers=quantized_layers(model))
    mixed_record = {"quant_algo": "MIXED_PRECISION", "quantized_layers": quantized_layers(model)}
    f32 = torch.float32
    channel = ct_group(ct_args(8, "channel"), activations=ct_args(8, "token", dynamic=True))
    return {
        "plain fp32": Dialect(plain(f32), dtype=f32),
        "plain bf16": Dialect(plain(torch.bfloat16)),
        "plain fp16": Dialect(plain(torch.float16), dtype=torch.float16),
        "modelopt nvfp4": Dialect(modelopt, section("NVFP4"), record("NVFP4")),
        "modelopt nvfp4, hf_quant_config.json only": Dialect(modelopt, None, record("nvfp4")),
        "modelopt nvfp4, config.json only": Dialect(modelopt, section("NVFP4")),
        "modelopt nvfp4, old shapes": Dialect(old_shapes, None, record("NVFP4")),
        "modelopt nvfp4, declared by nobody": Dialect(modelopt),
        "modelopt w4a16": Dialect(w4a16, section("W4A16_NVFP4"), record("W4A16_NVFP4")),
        "modelopt w4a16 with input_scale left": Dialect(modelopt, section("W4A16_NVFP4"), record("W4A16_NVFP4")),
        "modelopt awq": Dialect(
            awq, section("NVFP4_AWQ", None), record("NVFP4_AWQ", pre_quant_scale=True, has_zero_point=False)
        ),
        "modelopt awq, q and k apart": Dialect(awq_apart, section("NVFP4_AWQ", None), by_name=True),
        "modelopt w4a8": Dialect(w4a8, section("W4A8_NVFP4_FP8", None), record("W4A8_NVFP4_FP8", 32)),
        "modelopt fp8": Dialect(PER_TENSOR, section("FP8", None), record("FP8", None)),
        "modelopt fp8 per channel": Dialect(PER_ROW, None, record("FP8_PER_CHANNEL_PER_TOKEN", None)),
        "modelopt fp8 per block": Dialect(PER_BLOCK, None, record("fp8_pb_wo", None)),
        "modelopt mxfp4": Dialect(
            lambda m: {k.replace("_packed", ""): v for k, v in mxfp4(m).items()}, None, record("mxfp4", None)
        ),
        "modelopt mixed": Dialect(mixed, mixed_section, mixed_record, by_name=True),
        "compressed-tensors nvfp4": Dialect(
            compressed_tensors, ct_section("nvfp4-pack-quantized", ct_group(NVFP4_ARGS, activations=LOCAL))
        ),
        "compressed-tensors nvfp4a16": Dialect(
            lambda m: without(compressed_tensors(m), ".input_global_scale"),
            ct_section("nvfp4-pack-quantized", ct_group(NVFP4_ARGS)),
        ),
        "compressed-tensors fp8 per channel": Dialect(CT_PER_ROW, ct_section("float-quantized", channel)),
        "compressed-tensors fp8 per tensor": Dialect(
            fp8(0, 0, "weight_scale", lambda s: s.bfloat16().reshape(1)),
            ct_section("float-quantized", ct_group(ct_args(8, "tensor"))),
        ),
        "compressed-tensors fp8 per block": Dialect(
            fp8(128, 128, "weight_scale", lambda s: s.bfloat16()),
            ct_section("float-quantized", ct_group(ct_args(8, "block", block_structure=[128, 128]))),
        ),
        "compressed-tensors mxfp4": Dialect(
            mxfp4, ct_section("mxfp4-pack-quantized", ct_group(ct_args(4, "group", group_size=32)))
        ),
        "compressed-tensors mixed": Dialect(
            lambda name: CT_PER_ROW if "self_attn" in name else compressed_tensors,
            ct_section(
                "mixed-precision",
                ct_group(NVFP4_ARGS, ("re:.*mlp.*",), LOCAL),
                {**channel, "targets": ["re:.*self_attn.(q|k|v|o)_proj$"]},
                ignore=("re:.*lm_head",),
            ),
            by_name=True,
        ),
        "deepseek fp8": Dialect(DEEPSEEK, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    }
