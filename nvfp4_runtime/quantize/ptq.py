"""Post-training quantisation of a plain Hugging Face folder to ModelOpt NVFP4, group by group of fused layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nvfp4_runtime.checkpoint.detect import detect, is_excluded, read_config
from nvfp4_runtime.checkpoint.shards import DTYPES, PLAIN, Shards, TensorInfo
from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter, TensorSpec, new_folder
from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.quantize import export, recipes

logger = logging.getLogger(__name__)

METHODS = ("max",)
CHUNK_VALUES = 1 << 22  # weights quantised at a time: 16 MB in float32, so temporaries stay small


@dataclass(frozen=True)
class QuantizeReport:
    """What was made. Bytes count tensors, not files."""

    algo: str
    kv_algo: str | None
    num_quantized: int
    num_plain: int
    source_bytes: int
    out_bytes: int
    notes: tuple[str, ...]


def quantize_checkpoint(
    src: str | Path,
    out: str | Path,
    *,
    method: str = "max",
    input_scales: Mapping[str, float] | None = None,
    kv_scales: Mapping[str, tuple[float, float]] | None = None,
    exclude: Sequence[str] = (),
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write the plain model folder `src` as a ModelOpt NVFP4 folder `out`, which appears whole or not at all.

    method        "max": block scales from each block's maximum, bit for bit as ModelOpt's default
    input_scales  module -> amax / 2688 of its input, for every quantised module: gives NVFP4 (W4A4 and W4A16 serve).
                  None: W4A16_NVFP4 without input_scale, since ModelOpt's NVFP4 is not complete without
    kv_scales     attention module -> (k_scale, v_scale), amax / 448: declares an FP8 KV cache
    exclude       fnmatch patterns of modules to leave plain, besides the recipe's own (recipes.STAY_PLAIN)

    In memory at once: the layers of one fused group. Raises ConfigError for impossible wishes, CheckpointError for
    sources that cannot be read.
    """
    src, out = Path(src), Path(out)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}", "--method")
    raw_config = read_config(src)
    if (declared := detect(src, raw_config)).method != "none":
        raise ConfigError(
            f"{src} is already quantised ({declared.method} {declared.algo}); give the plain model", "SRC"
        )
    shards = Shards(src)
    chosen, plain, notes = _choose(shards, exclude)
    if not chosen:
        raise ConfigError(f"nothing in {src} would be quantised; check --exclude and that it is a decoder model", "SRC")
    scales = _shared_input_scales(input_scales, chosen)
    algo = "W4A16_NVFP4" if scales is None else "NVFP4"
    kv_algo = "FP8" if kv_scales is not None else None
    specs = _specs(shards, chosen, scales is not None, kv_scales or {})
    report = QuantizeReport(
        algo=algo,
        kv_algo=kv_algo,
        num_quantized=len(chosen),
        num_plain=len(plain),
        source_bytes=sum(info.nbytes for info in shards),
        out_bytes=sum(spec.nbytes for spec in specs),
        notes=tuple(notes),
    )
    for note in notes:
        logger.warning("%s: %s", src, note)
    with (
        new_folder(out) as folder,
        tqdm(
            total=report.source_bytes,
            unit="B",
            unit_scale=True,
            desc=f"quantise to {algo}",
            disable=not progress,
        ) as bar,
    ):
        with ShardWriter(folder, specs, max_shard_bytes) as writer:
            for group in _groups(shards, chosen):
                _write_group(shards, writer, group, scales)
                bar.update(sum(info.nbytes for info in group))
            for info in shards:
                if recipes.module_of(info.name) not in chosen or not info.name.endswith(".weight"):
                    writer.write(info.name, shards.read(info.name, dtypes=tuple(DTYPES)))
                    bar.update(info.nbytes)
            for attn, (k_scale, v_scale) in (kv_scales or {}).items():
                k_spec, v_spec = export.kv_specs(attn)
                writer.write(k_spec.name, torch.tensor(k_scale, dtype=torch.float32))
                writer.write(v_spec.name, torch.tensor(v_scale, dtype=torch.float32))
        export.write_configs(folder, raw_config, algo, kv_algo, plain)
        export.copy_companions(src, folder)
    shards.close()
    return report


def _choose(shards: Shards, exclude: Sequence[str]) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """Modules to quantise, modules with matrices that stay plain (for exclude_modules), and notes."""
    chosen: dict[str, TensorInfo] = {}
    plain = {"lm_head": None}  # listed even when tied, as ModelOpt does
    notes: list[str] = []
    for info in shards:
        if info.name.endswith(".weight") and info.dtype not in PLAIN:
            raise UnsupportedFormatError(
                f"{info.name} in {info.file.name} is {info}; quantising starts from {', '.join(PLAIN)} weights"
            )
        reason = recipes.why_plain(info, exclude)
        module = recipes.module_of(info.name)
        if reason is None:
            chosen[module] = info
        elif recipes.is_matrix(info):
            plain[module] = None
            if "multiple" in reason:
                notes.append(f"{module} stays plain: {reason}")
    known = [*chosen, *plain]
    for pattern in exclude:
        if not any(is_excluded(module, (pattern,)) for module in known):
            notes.append(f"the exclusion {pattern!r} matches no layer")
    return chosen, list(plain), notes


def _shared_input_scales(
    input_scales: Mapping[str, float] | None, chosen: Mapping[str, TensorInfo]
) -> dict[str, float] | None:
    """One input_scale per fused group, the largest, checked to be there and usable."""
    if input_scales is None:
        return None
    if missing := [module for module in chosen if module not in input_scales]:
        raise ConfigError(
            f"{len(missing)} layer(s) have no input scale, e.g. {missing[0]}; calibrate with the same model", "--calib"
        )
    shared: dict[str, float] = {}
    for module in chosen:
        value, group = input_scales[module], recipes.fused_group(module)
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"the input scale of {module} is {value}; expected a positive number", "--calib")
        shared[group] = max(value, shared.get(group, 0.0))
    return {module: shared[recipes.fused_group(module)] for module in chosen}


def _specs(
    shards: Shards, chosen: Mapping[str, TensorInfo], input_scale: bool, kv_scales: Mapping[str, object]
) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for info in shards:
        if (module := recipes.module_of(info.name)) in chosen and info.name.endswith(".weight"):
            specs += export.layer_specs(module, info.shape[0], info.shape[1], input_scale=input_scale)
        else:
            specs.append(TensorSpec(info.name, info.dtype, info.shape))
    for attn in kv_scales:
        specs += export.kv_specs(attn)
    return specs


def _groups(shards: Shards, chosen: Mapping[str, TensorInfo]) -> list[list[TensorInfo]]:
    groups: dict[str, list[TensorInfo]] = {}
    for module, info in chosen.items():
        groups.setdefault(recipes.fused_group(module), []).append(info)
    return list(groups.values())


def _write_group(
    shards: Shards, writer: ShardWriter, group: Sequence[TensorInfo], scales: Mapping[str, float] | None
) -> None:
    weights = [shards.read(info.name) for info in group]
    amax = torch.zeros((), dtype=torch.float32)
    for info, weight in zip(group, weights, strict=True):
        own = weight.abs().max().to(torch.float32)
        if not bool(torch.isfinite(own)):
            raise CheckpointError(f"{info.name} in {info.file.name} holds NaN or Inf; such a layer cannot be quantised")
        amax = torch.maximum(amax, own)
    scale_2 = codec.weight_scale_2(amax)
    for info, weight in zip(group, weights, strict=True):
        module = recipes.module_of(info.name)
        packed, block_scale = quantize_rows(weight, scale_2)
        writer.write(f"{module}.weight", packed)
        writer.write(f"{module}.weight_scale", block_scale)
        writer.write(f"{module}.weight_scale_2", scale_2)
        if scales is not None:
            writer.write(f"{module}.input_scale", torch.tensor(scales[module], dtype=torch.float32))


def quantize_rows(weight: Tensor, scale_2: Tensor) -> tuple[Tensor, Tensor]:
    """`codec.quantize`, some rows at a time."""
    rows = max(1, CHUNK_VALUES // weight.shape[1])
    parts = [codec.quantize(chunk, scale_2) for chunk in torch.split(weight, rows)]
    scales = torch.cat([scale.view(torch.uint8) for _, scale in parts]).view(torch.float8_e4m3fn)
    return torch.cat([packed for packed, _ in parts]), scales
