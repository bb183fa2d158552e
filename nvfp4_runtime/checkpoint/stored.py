"""How each module of a checkpoint is stored, told from names, dtypes and shapes alone: no weight is read.

Dialects spell one idea in many ways; the tables below list the spellings, and `StoredLayer` is the one answer. The
loader and `nvfp4 inspect` both ask here, so that they cannot disagree about what a file holds.

modelopt            P.weight U8 [N, K/2], P.weight_scale E4M3 [N, K/16], P.weight_scale_2, P.input_scale
compressed-tensors  P.weight_packed U8, P.weight_scale E4M3, P.weight_global_scale, P.input_global_scale (divisors)
stacks of experts   P is "...experts.gate_up_proj": P (or P_packed) [E, ...], P_weight_scale or P_scale, ...
gpt-oss             P_blocks U8 [E, N, K/32, 16], P_scales U8 [E, N, K/32], P_bias [E, N]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nvfp4_runtime.checkpoint.shards import PLAIN, Shards, TensorInfo
from nvfp4_runtime.errors import CheckpointError, MissingTensorError, TensorShapeError, UnsupportedFormatError

Dialect = Literal["plain", "modelopt", "compressed-tensors", "deepseek", "gpt-oss", "unknown"]
Role = Literal["weight", "block_scale", "tensor_scale", "scale", "input_scale", "pre_quant_scale", "bias", "other"]

FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}
E8M0 = ("U8", "F8_E8M0")
NVFP4_GROUPS = (16, 32)  # 32: ModelOpt's W4A8_NVFP4_FP8
MXFP4_GROUP = 32
FP8_BLOCK = 128

# What may follow "P." in a tensor's name, and its role. The scale of a 4-bit weight is a block_scale, FP8's a scale.
_DOTTED: dict[str, Role] = {
    "weight": "weight",
    "weight_packed": "weight",
    "weight_scale": "scale",
    "weight_scale_inv": "scale",
    "weight_scale_2": "tensor_scale",
    "weight_global_scale": "tensor_scale",
    "input_scale": "input_scale",
    "input_global_scale": "input_scale",
    "pre_quant_scale": "pre_quant_scale",
    "bias": "bias",
}
# What may follow "P" where P is a stack of experts; "" is the stack itself.
_STACKED: dict[str, Role] = {
    "": "weight",
    "_packed": "weight",
    "_weight_packed": "weight",
    "_blocks": "weight",
    "_scales": "scale",
    "_scale": "scale",
    "_weight_scale": "scale",
    "_weight_scale_inv": "scale",
    "_scale_inv": "scale",
    "_global_scale": "tensor_scale",
    "_weight_global_scale": "tensor_scale",
    "_weight_scale_2": "tensor_scale",
    "_input_scale": "input_scale",
    "_input_global_scale": "input_scale",
    "_pre_quant_scale": "pre_quant_scale",
    "_bias": "bias",
}
# Leaves by which layouts without a reader give themselves away, and what to say of them.
_FOREIGN: dict[str, str] = {
    "qweight": "GPTQ or AWQ integers",
    "qzeros": "GPTQ or AWQ integers",
    "g_idx": "GPTQ integers",
    "weight_shape": "compressed-tensors' integers (pack-quantized)",
    "weight_zero_point": "an asymmetric compressed-tensors scheme",
    "input_scale_2": "Quark NVFP4 (AMD)",
    "scales": "MLX",
    "biases": "MLX",
    "qdata": "torchao's NVFP4Tensor",
    "weight_qdata": "torchao's NVFP4Tensor",
    "_weight_qdata": "torchao's NVFP4Tensor",
    "comfy_quant": "a ComfyUI single file",
    "weight_double_scale": "a compressed re-export whose scales are themselves packed (--low_memory_mode)",
    "weight_scale_double_scale": "a compressed re-export whose scales are themselves packed (--low_memory_mode)",
    "absmax": "bitsandbytes",
    "svdquant_lora_a": "SVDQuant, whose low-rank part must be added",
    "svdquant_lora_b": "SVDQuant, whose low-rank part must be added",
}
_STACK = re.compile(r"(.*\.(?:gate_up_proj|gate_proj|up_proj|down_proj))(_[a-z_0-9]+)?")
_KV = re.compile(
    r"(?:^|[._])(?:k|v|kv)_(?:scale|bias|zero_point)$|\.(?:q_scale|prob_output_scale)$|[kv]_proj\.output_scale$"
)
_FETCH = "it is meaningless without its scales: fetch or export the checkpoint again"


@dataclass(frozen=True)
class StoredLayer:
    """One module as its files hold it.

    prefix      the module's path; for a stack of experts the tensor's, e.g. "model.layers.0.mlp.experts.down_proj"
    dialect     whose spelling it is
    format      "nvfp4", "fp8", "mxfp4", "bf16", "fp16", "fp32"; "unknown" where `problem` says why
    n, k        logical out and in features of one expert; a vector has k = 1
    experts     E for a stack, 0 for a single matrix
    block       rows and columns under one scale: (1, 16) NVFP4, (1, 32) MXFP4 and W4A8, (n, k) FP8 per tensor,
                (1, k) per row, (128, 128) and the like; None for plain weights
    tensors     tensor name by role: "weight", "block_scale" (4-bit), "tensor_scale", "scale" (FP8), "input_scale",
                "pre_quant_scale", "bias", "other"
    transposed  a stack whose matrices are [K, N]: packing and scales run along the first of the two
    nbytes      bytes of all of them, the bias left out
    problem     why it cannot be read, as the error the loader raises; None for a sound header
    """

    prefix: str
    dialect: Dialect
    format: str
    n: int
    k: int
    experts: int = 0
    block: tuple[int, int] | None = None
    tensors: Mapping[Role, str] = field(default_factory=dict)
    transposed: bool = False
    nbytes: int = 0
    problem: CheckpointError | None = None

    @property
    def num_weights(self) -> int:
        """Logical values, all experts together."""
        return max(1, self.experts) * self.n * self.k

    @property
    def bits_per_weight(self) -> float:
        """Codes and all scales over logical values."""
        return 8 * self.nbytes / self.num_weights if self.num_weights else 0.0

    @property
    def divides(self) -> bool:
        """Whether tensor_scale and input_scale are divisors, as compressed-tensors stores them."""
        return self.dialect == "compressed-tensors"


@dataclass(frozen=True)
class Loose:
    """A tensor of no module: kind is "kv_scale", "orphan" (a scale without its weight) or "parameter"."""

    info: TensorInfo
    kind: Literal["kv_scale", "orphan", "parameter"]


def stored_layer(shards: Shards, prefix: str) -> StoredLayer | None:
    """How the module (or stack of experts) `prefix` is stored; None when no tensor is a weight of that name."""
    found: dict[str, TensorInfo] = {}
    for leaf in (*_DOTTED, *_FOREIGN):
        if (info := shards.info(f"{prefix}.{leaf}")) is not None:
            found[f".{leaf}"] = info
    if _STACK.fullmatch(prefix):
        for leaf in _STACKED:
            if (info := shards.info(f"{prefix}{leaf}")) is not None:
                found[leaf] = info
    return _describe(shards, prefix, found)


def modules(shards: Shards) -> Iterator[StoredLayer]:
    """Every module once, in the files' order. Each tensor belongs to one of them or is among `loose`."""
    for prefix, found in _by_prefix(shards).items():
        if (layer := _describe(shards, prefix, found)) is not None:
            yield layer


def loose(shards: Shards) -> Iterator[Loose]:
    """Every tensor that no module of `modules` owns."""
    owned = {info.name for prefix, found in _by_prefix(shards).items() if _has_weight(found) for info in found.values()}
    for info in shards:
        if info.name in owned:
            continue
        if _KV.search(info.name):
            yield Loose(info, "kv_scale")
        else:
            yield Loose(info, "parameter" if _split(info.name) is None else "orphan")


def _split(name: str) -> tuple[str, str] | None:
    """A tensor's name as its module's prefix and what follows; None for a parameter of no known spelling."""
    module, _, leaf = name.rpartition(".")
    if module and (leaf in _DOTTED or leaf in _FOREIGN):
        return module, f".{leaf}"
    match = _STACK.fullmatch(name)
    if match is not None and (match[2] or "") in _STACKED:
        return match[1], match[2] or ""
    return None


def _by_prefix(shards: Shards) -> dict[str, dict[str, TensorInfo]]:
    groups: dict[str, dict[str, TensorInfo]] = {}
    for info in shards:
        if (parts := _split(info.name)) is not None and not _KV.search(info.name):
            groups.setdefault(parts[0], {})[parts[1]] = info
    return groups


def _role(suffix: str) -> Role:
    return _DOTTED.get(suffix[1:], "other") if suffix.startswith(".") else _STACKED[suffix]


def _has_weight(found: Mapping[str, TensorInfo]) -> bool:
    return any(_role(suffix) in ("weight", "other") for suffix in found)


class _Form(NamedTuple):
    dialect: Dialect
    format: str
    n: int
    k: int
    experts: int = 0
    block: tuple[int, int] | None = None
    transposed: bool = False


def _describe(shards: Shards, prefix: str, found: Mapping[str, TensorInfo]) -> StoredLayer | None:
    """The module of these tensors, given by what follows `prefix` in their names."""
    if not _has_weight(found):
        return None
    tensors: dict[Role, str] = {_role(suffix): info.name for suffix, info in found.items()}
    problem: CheckpointError | None = None
    try:
        form = _form(shards, prefix, found)
    except CheckpointError as error:
        problem, form = error, _guess(found)
    if form.format in ("nvfp4", "mxfp4") and "scale" in tensors:
        tensors["block_scale"] = tensors.pop("scale")
    nbytes = sum(info.nbytes for suffix, info in found.items() if _role(suffix) != "bias")
    return StoredLayer(prefix, *form[:6], tensors, form.transposed, nbytes, problem)


def _form(shards: Shards, prefix: str, found: Mapping[str, TensorInfo]) -> _Form:
    by_role: dict[Role, list[TensorInfo]] = {}
    for suffix, info in found.items():
        by_role.setdefault(_role(suffix), []).append(info)
    for leaf, what in _FOREIGN.items():
        if (clue := found.get(f".{leaf}")) is not None:
            raise UnsupportedFormatError(
                f"{clue.name} in {clue.file.name} is {clue}: {what} has no reader here; export the model again as "
                "ModelOpt or compressed-tensors NVFP4, or quantise a BF16 copy with `nvfp4 quantize`"
            )
    for role, infos in by_role.items():
        if len(infos) > 1:
            raise UnsupportedFormatError(
                f"{prefix} has two tensors that mean its {role.replace('_', ' ')}: {infos[0].name} ({infos[0]}) and "
                f"{infos[1].name} ({infos[1]}); expected one: delete the one that is not meant"
            )
    weight = by_role["weight"][0]
    one = {role: infos[0] for role, infos in by_role.items()}
    if weight.name.endswith("_blocks"):
        return _blocks(weight, one)
    if weight.dtype == "U8":
        return _packed(prefix, weight, one)
    if weight.dtype == "F8_E4M3":
        return _fp8(shards, prefix, weight, one)
    if weight.dtype in PLAIN:
        return _plain(shards, prefix, weight, one)
    if weight.dtype == "U32":
        raise UnsupportedFormatError(
            f"{weight.name} in {weight.file.name} is {weight}: codes packed into 32-bit words (MLX) have no reader "
            "here; quantise a BF16 copy with `nvfp4 quantize`"
        )
    raise TensorShapeError(weight.name, weight.file.name, "U8 (NVFP4, MXFP4), F8_E4M3, BF16, F16 or F32", str(weight))


def _guess(found: Mapping[str, TensorInfo]) -> _Form:
    """Logical sizes as far as one can tell of a module with a problem."""
    info = next((info for suffix, info in found.items() if _role(suffix) == "weight"), None)
    if info is None or not info.shape:
        return _Form("unknown", "unknown", 1, 1)
    *outer, last = info.shape
    k = 2 * last if info.dtype == "U8" else last
    if not outer:
        return _Form("unknown", "unknown", k, 1)
    return _Form("unknown", "unknown", outer[-1], k, math.prod(outer[:-1]) if len(outer) > 1 else 0)


def _blocks(weight: TensorInfo, one: Mapping[Role, TensorInfo]) -> _Form:
    """gpt-oss: MXFP4 blocks of 16 bytes along an axis of their own."""
    if weight.dtype != "U8" or len(weight.shape) != 4 or weight.shape[3] != MXFP4_GROUP // 2:
        raise TensorShapeError(weight.name, weight.file.name, "U8 [experts, out, in/32, 16]", str(weight))
    experts, n, groups, _ = weight.shape
    scale = one.get("scale")
    if scale is None:
        raise MissingTensorError(f"{weight.name.removesuffix('blocks')}scales", str(weight.file), _FETCH)
    if scale.dtype not in E8M0 or scale.shape != (experts, n, groups):
        raise TensorShapeError(scale.name, scale.file.name, f"U8 {[experts, n, groups]}", str(scale))
    return _Form("gpt-oss", "mxfp4", n, MXFP4_GROUP * groups, experts, (1, MXFP4_GROUP))


def _packed(prefix: str, weight: TensorInfo, one: Mapping[Role, TensorInfo]) -> _Form:
    """Two codes to a byte: NVFP4 under E4M3 block scales, MXFP4 under E8M0 ones."""
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        raise TensorShapeError(weight.name, weight.file.name, "U8 [out, in/2], or [experts, out, in/2]", str(weight))
    scale, tensor_scale = one.get("scale"), one.get("tensor_scale")
    dotted = weight.name != prefix and not weight.name.startswith(f"{prefix}_")
    divides = weight.name.endswith("_packed") or (tensor_scale is not None and "global" in tensor_scale.name)
    dialect: Dialect = "compressed-tensors" if divides else "modelopt"
    if scale is None:
        name = f"{prefix}.weight_scale" if dotted else f"{prefix}_scale" if divides else f"{prefix}_weight_scale"
        raise MissingTensorError(name, str(weight.file), f"{weight.name} is {weight}: {_FETCH}")
    if scale.dtype in E8M0 and tensor_scale is None:
        n, k, _, transposed = _groups(weight, scale, (MXFP4_GROUP,))
        return _Form(dialect, "mxfp4", n, k, _experts(weight), (1, MXFP4_GROUP), transposed)
    if scale.dtype != "F8_E4M3":
        raise TensorShapeError(scale.name, scale.file.name, f"F8_E4M3 {_scale_shape(weight)}", str(scale))
    n, k, group, transposed = _groups(weight, scale, NVFP4_GROUPS[:1] if divides else NVFP4_GROUPS)
    if tensor_scale is None:
        leaf = "weight_global_scale" if divides else "weight_scale_2"
        name = f"{prefix}.{leaf}" if dotted else f"{prefix}_{leaf.removeprefix('weight_') if divides else leaf}"
        raise MissingTensorError(name, str(weight.file), f"{weight.name} is packed NVFP4: {_FETCH}")
    return _Form(dialect, "nvfp4", n, k, _experts(weight), (1, group), transposed)


def _experts(weight: TensorInfo) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 0


def _groups(weight: TensorInfo, scale: TensorInfo, allowed: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """(n, k, inputs under one scale, transposed) from the two shapes; TensorShapeError when they do not belong."""
    a, b = weight.shape[-2:]
    shape = scale.shape
    if len(shape) == 3 and len(weight.shape) == 2 and shape[0] == 1:  # old exports keep a leading 1
        shape = shape[1:]
    if len(shape) == len(weight.shape) and shape[:-2] == weight.shape[:-2]:
        for group in allowed:
            if shape[-2:] == (a, 2 * b / group):
                return a, 2 * b, group, False
            if len(shape) == 3 and shape[-2:] == (2 * a / group, b):
                return b, 2 * a, group, True
    wanted = f"{'F8_E4M3' if allowed[0] == 16 else 'U8'} {_scale_shape(weight, allowed[0])}"
    if len(shape) == 1 or math.prod(shape) >= math.prod(weight.shape) * 2 // allowed[0]:
        wanted += ", row-major (not padded, not swizzled into 128 x 4 tiles)"
    raise TensorShapeError(scale.name, scale.file.name, wanted, str(scale))


def _scale_shape(weight: TensorInfo, group: int = 16) -> list[int]:
    return [*weight.shape[:-1], 2 * weight.shape[-1] // group]


def _fp8(shards: Shards, prefix: str, weight: TensorInfo, one: Mapping[Role, TensorInfo]) -> _Form:
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        raise TensorShapeError(weight.name, weight.file.name, "F8_E4M3 [out, in], or [experts, out, in]", str(weight))
    transposed = _is_transposed(shards, prefix, weight)
    n, k = weight.shape[:-3:-1] if transposed else weight.shape[-2:]
    scale = one.get("scale")
    if scale is None:
        raise MissingTensorError(f"{prefix}.weight_scale", str(weight.file), f"{weight.name} is {weight}: {_FETCH}")
    if scale.dtype in E8M0:
        raise UnsupportedFormatError(
            f"{scale.name} in {scale.file.name} is {scale}: FP8 under E8M0 scales (MXFP8) has no reader here; expected "
            "BF16 or F32 scales"
        )
    block = _fp8_block(weight, scale, n, k, transposed)
    dialect: Dialect = "modelopt"
    if scale.name.endswith("_scale_inv"):
        dialect = "deepseek"
    elif scale.dtype == "BF16" or (scale.dtype == "F32" and len(scale.shape) == 2 and scale.shape[-1] == 1):
        dialect = "compressed-tensors"
    return _Form(dialect, "fp8", n, k, _experts(weight), block, transposed)


def _fp8_block(weight: TensorInfo, scale: TensorInfo, n: int, k: int, transposed: bool) -> tuple[int, int]:
    """Rows and columns under one scale: per tensor, per row, or blocks (of 128 x 128 where that fits)."""
    shape = scale.shape
    if len(weight.shape) == 3 and shape[:1] == weight.shape[:1]:
        shape = shape[1:]
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt: [n/128, 1, k/128, 1]
        shape = (shape[0], shape[2])
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if transposed and len(shape) == 2:
        shape = shape[::-1]
    if math.prod(shape) == 1:
        return n, k
    if shape in ((n,), (n, 1)):
        return 1, k
    if len(shape) == 2:
        rows, columns = shape
        if (rows, columns) == (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)):
            return FP8_BLOCK, FP8_BLOCK
        if rows and columns and n % rows == 0 and k % columns == 0:
            return n // rows, k // columns
    wanted = f"F32 [] (per tensor), [{n}, 1] (per row) or {[-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)]} (per 128 x 128)"
    raise TensorShapeError(scale.name, scale.file.name, wanted, str(scale))


def _plain(shards: Shards, prefix: str, weight: TensorInfo, one: Mapping[Role, TensorInfo]) -> _Form:
    if (scale := one.get("scale") or one.get("tensor_scale")) is not None:
        raise TensorShapeError(weight.name, weight.file.name, f"U8, since {scale.name} ({scale}) is there", str(weight))
    form, shape = FORMATS[weight.dtype], weight.shape
    if len(shape) == 3 and _STACK.fullmatch(prefix):
        transposed = _is_transposed(shards, prefix, weight)
        n, k = shape[:-3:-1] if transposed else shape[-2:]
        return _Form("plain", form, n, k, shape[0], None, transposed)
    return _Form("plain", form, shape[0] if shape else 1, math.prod(shape[1:]))  # norms, convolutions, embeddings


def _is_transposed(shards: Shards, prefix: str, weight: TensorInfo) -> bool:
    """Whether a stack's matrices lie as batched multiplication wants them, [K, N] (Llama 4, gpt-oss).

    Its sibling tells: down_proj has half as many inputs as gate_up_proj has outputs, so only one reading fits both.
    Without a sibling, [N, K].
    """
    parent, _, leaf = prefix.rpartition(".")
    if len(weight.shape) != 3 or leaf not in ("gate_up_proj", "down_proj"):
        return False
    other = f"{parent}.{'down_proj' if leaf == 'gate_up_proj' else 'gate_up_proj'}"
    sibling = shards.info(other) or shards.info(f"{other}.weight")
    if sibling is None or len(sibling.shape) != 3:
        return False
    gate_up, down = (weight, sibling) if leaf == "gate_up_proj" else (sibling, weight)
    return gate_up.shape[2] == 2 * down.shape[1] and gate_up.shape[1] == down.shape[2]
