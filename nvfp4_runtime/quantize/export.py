"""ModelOpt's unified Hugging Face layout: which tensors a quantised layer becomes, and what the JSON files say."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime import __version__
from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT
from nvfp4_runtime.checkpoint.writer import TensorSpec, write_json
from nvfp4_runtime.nvfp4.codec import BLOCK

PRODUCER = {"name": "nvfp4-runtime", "version": __version__}

# Tokenizer, template and generation files travel with the weights. By name: nothing executable is ever copied.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


def layer_specs(module: str, n: int, k: int, *, input_scale: bool) -> list[TensorSpec]:
    """The tensors of one NVFP4 layer [n, k]."""
    specs = [
        TensorSpec(f"{module}.weight", "U8", (n, k // 2)),
        TensorSpec(f"{module}.weight_scale", "F8_E4M3", (n, k // BLOCK)),
        TensorSpec(f"{module}.weight_scale_2", "F32", ()),
    ]
    if input_scale:
        specs.append(TensorSpec(f"{module}.input_scale", "F32", ()))
    return specs


def kv_specs(attn_prefix: str) -> list[TensorSpec]:
    """The FP8 KV cache's scales of one attention layer."""
    names = (f"{attn_prefix}.k_proj.k_scale", f"{attn_prefix}.v_proj.v_scale")
    return [TensorSpec(name, "F32", ()) for name in names]


def write_configs(
    folder: Path, raw_config: dict[str, Any], algo: str, kv_algo: str | None, exclude: Sequence[str]
) -> None:
    """hf_quant_config.json, and config.json with the same facts as its quantization_config."""
    record = {
        "quant_algo": algo,
        "kv_cache_quant_algo": kv_algo,
        "group_size": BLOCK,
        "exclude_modules": list(exclude),
    }
    write_json(folder / HF_QUANT, {"producer": PRODUCER, "quantization": record})
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group: dict[str, Any] = {"weights": fp4, "targets": ["Linear"]}
    if algo == "NVFP4":
        group = {"input_activations": dict(fp4), **group}
    section: dict[str, Any] = {
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "quant_algo": algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    if kv_algo == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    write_json(folder / CONFIG, {**raw_config, "quantization_config": section})


def copy_companions(source: Path, out: Path) -> None:
    """Copy the files of `COMPANIONS` that exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
