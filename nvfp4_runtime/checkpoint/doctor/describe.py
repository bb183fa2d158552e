"""What is stored, layer by layer and in sum, in the report's words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from nvfp4_runtime.checkpoint.doctor.case import Case
from nvfp4_runtime.checkpoint.doctor.measure import FloatCounts, Measured, is_plain
from nvfp4_runtime.checkpoint.doctor.report import NO_DECIBELS, Fit, Group, Layer, Scales
from nvfp4_runtime.errors import MissingTensorError

GIB = 1 << 30
MEMORIES = tuple(size * GIB for size in (8, 12, 16, 24, 32, 48, 80, 141, 192))  # cards and laptops as they are sold


def layers(case: Case) -> tuple[Layer, ...]:
    return tuple(_layer(case, measured) for measured in case.layers)


def architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "unknown"


def _layer(case: Case, measured: Measured) -> Layer:
    stored = measured.stored
    bias = case.shards.info(stored.tensors.get("bias", ""))
    excluded, why = _why(case, measured)
    comparison = measured.comparison
    error = comparison.relative_error if comparison is not None else math.nan
    return Layer(
        name=stored.prefix,
        stored=_stored(case, measured),
        shape=_shape(case, measured),
        parameters=stored.num_weights + (math.prod(bias.shape) if bias is not None else 0),
        bytes=stored.nbytes + (bias.nbytes if bias is not None else 0),
        bits_per_weight=round(stored.bits_per_weight, 6),
        excluded=excluded,
        why=why,
        scales=_scales(measured),
        sqnr_db=finite(comparison.sqnr_db) if comparison is not None else None,
        relative_error=finite(error) if math.isfinite(error) else None,
    )


def _stored(case: Case, measured: Measured) -> str:
    """The format; what a broken one was meant to be."""
    stored = measured.stored
    if stored.format != "unknown":
        return stored.format
    weight = case.shards.info(stored.tensors.get("weight", ""))
    if weight is None:
        return "unknown"
    meant = {"U8": "nvfp4", "F8_E4M3": "fp8"}.get(weight.dtype)
    if meant is None:
        return f"unknown {weight.dtype.lower()}"
    return f"{'incomplete' if isinstance(stored.problem, MissingTensorError) else 'broken'} {meant}"


def _shape(case: Case, measured: Measured) -> tuple[int, ...]:
    stored = measured.stored
    weight = case.shards.info(stored.tensors.get("weight", ""))
    if weight is not None and is_plain(stored) and not stored.experts:
        return weight.shape
    return (stored.experts, stored.n, stored.k) if stored.experts else (stored.n, stored.k)


def _why(case: Case, measured: Measured) -> tuple[bool | None, str]:
    """Whether a layer is excluded, and why it is stored as it is."""
    quantised = measured.stored.block is not None
    if case.quant.algo is None:
        return None, "quantised, and nothing declares it" if quantised else "nothing is declared quantised"
    pattern = case.excluded_by(measured.name)
    if pattern is not None:
        return True, f"quantised although {pattern!r} excludes it" if quantised else f"excluded by {pattern!r}"
    if quantised:
        algos = case.algos(measured.name)
        return False, f"declared {' or '.join(sorted(algos))}" if algos else "quantised, and nothing declares it"
    if measured.stored.problem is not None:
        return False, str(measured.stored.problem)
    return False, "not excluded; no tool quantises this kind" if measured.stored.k == 1 else "plain, and not excluded"


def _scales(measured: Measured) -> Scales | None:
    codes = measured.codes
    if measured.stored.block is None and measured.blocks is None:
        return None
    least = most = None
    if measured.blocks is not None:
        least, most = measured.blocks.least, measured.blocks.most
    elif measured.exponents is not None:
        least, most = measured.exponents[:2]
    elif measured.scale is not None:
        least, most = measured.scale.least, measured.scale.most
    return Scales(
        block_min=least,
        block_max=most,
        tensor=_multiplier(measured, measured.tensor_scale),
        input=_multiplier(measured, measured.input_scale),
        zero_blocks=round(codes.zero_blocks / codes.blocks, 6) if codes is not None and codes.blocks else None,
        saturated_blocks=round(codes.clipped_blocks / codes.blocks, 6) if codes is not None and codes.blocks else None,
    )


def _multiplier(measured: Measured, scale: FloatCounts | None) -> float | None:
    """The largest of the stored scales as a multiplier, where there is a usable one."""
    if scale is None:
        return None
    extreme = scale.least if measured.stored.divides else scale.most
    return finite(measured.multiplier(extreme)) if extreme is not None else None


class _Key(NamedTuple):
    name: str
    stored: str
    shape: tuple[int, ...]
    excluded: bool | None
    input_scale: bool


def groups(found: Sequence[Layer]) -> tuple[Group, ...]:
    """Layers that differ only in their numbers, in the order of their first; vectors (norms) together at the end."""
    made: dict[_Key, list[Layer]] = {}
    for layer in found:
        vector = len(layer.shape) < 2
        name = "norms and other vectors" if vector else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
        shape = () if vector else layer.shape
        calibrated = layer.scales is not None and layer.scales.input is not None
        made.setdefault(_Key(name, layer.stored, shape, None if vector else layer.excluded, calibrated), []).append(
            layer
        )
    result = [_group(key, members) for key, members in made.items()]
    return tuple(sorted(result, key=lambda g: not g.shape))


def ungrouped(found: Sequence[Layer]) -> tuple[Group, ...]:
    """Every layer as a group of one."""
    calibrated = [layer.scales is not None and layer.scales.input is not None for layer in found]
    return tuple(
        _group(_Key(layer.name, layer.stored, layer.shape, layer.excluded, has), [layer])
        for layer, has in zip(found, calibrated, strict=True)
    )


def _group(key: _Key, members: list[Layer]) -> Group:
    parameters = sum(layer.parameters for layer in members)
    size = sum(layer.bytes for layer in members)
    whys = {layer.why for layer in members}
    return Group(
        name=key.name,
        count=len(members),
        stored=key.stored,
        shape=key.shape,
        parameters=parameters,
        bytes=size,
        bits_per_weight=round(8 * size / parameters, 6) if parameters else 0.0,
        excluded=key.excluded,
        why=members[0].why if len(whys) == 1 else f"{members[0].why}, and {len(whys) - 1} other reason(s)",
        input_scale=key.input_scale,
        scales=_joined([layer.scales for layer in members if layer.scales is not None]),
        worst_sqnr_db=min((layer.sqnr_db for layer in members if layer.sqnr_db is not None), default=None),
    )


def _joined(scales: list[Scales]) -> Scales | None:
    """The range over several layers; shares are the largest."""
    if not scales:
        return None

    def most(name: str) -> float | None:
        return max((v for s in scales if (v := getattr(s, name)) is not None), default=None)

    return Scales(
        block_min=min((s.block_min for s in scales if s.block_min is not None), default=None),
        block_max=most("block_max"),
        tensor=most("tensor"),
        input=most("input"),
        zero_blocks=most("zero_blocks"),
        saturated_blocks=most("saturated_blocks"),
    )


def bytes_by_format(found: Sequence[Layer], total: int) -> dict[str, int]:
    """Bytes of the layers by format, largest first, and of the tensors that belong to none."""
    sums: dict[str, int] = {}
    for layer in found:
        sums[layer.stored] = sums.get(layer.stored, 0) + layer.bytes
    if other := total - sum(sums.values()):
        sums["scales of the KV cache and others"] = other
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def kv_cache(case: Case) -> tuple[str, int | None]:
    """("fp8" or "bf16", bytes of K and V per token over all layers or None for other shapes of model)."""
    kv_dtype = {"FP8": "fp8", "NVFP4": "nvfp4"}.get(case.quant.kv_algo or "", "bf16")
    config = case.model_config
    num_layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    kv_heads, hidden, head_dim = (
        config.get("num_key_value_heads", heads),
        config.get("hidden_size"),
        config.get("head_dim"),
    )
    if head_dim is None and type(hidden) is int and type(heads) is int and heads > 0:
        head_dim = hidden // heads
    if config.get("kv_lora_rank") or config.get("hybrid_override_pattern"):
        return kv_dtype, None  # MLA and hybrids keep other things than K and V of every layer
    sizes = (num_layers, kv_heads, head_dim)
    if not all(type(size) is int and size > 0 for size in sizes):
        return kv_dtype, None
    values = 2 * math.prod(size for size in sizes if type(size) is int)
    bits = {"fp8": 8, "nvfp4": 4.5}.get(kv_dtype, 16)
    return kv_dtype, math.ceil(values * bits / 8)


def fits(weights: int, kv_bytes_per_token: int | None, memories: Sequence[int]) -> tuple[Fit, ...]:
    """Weights and KV tokens per memory; activations and the program need some memory beside them."""
    return tuple(
        Fit(size, weights <= size, max(0, size - weights) // kv_bytes_per_token if kv_bytes_per_token else None)
        for size in memories
    )


def finite(value: float) -> float:
    """For JSON: NaN and infinities become the largest number that stands for them, 999 (dB) with their sign."""
    if math.isfinite(value):
        return round(value, 9) if abs(value) > 1e-3 else value
    return -NO_DECIBELS if value < 0 or math.isnan(value) else NO_DECIBELS
