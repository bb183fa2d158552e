"""ModelOpt's unified Hugging Face layout: which tensors a quantised layer becomes, and what the JSON files say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_runtime import __version__
from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT
from nvfp4_runtime.checkpoint.writer import TensorSpec, naming, write_json
from nvfp4_runtime.nvfp4.codec import BLOCK

if TYPE_CHECKING:
    from nvfp4_runtime.quantize.plan import Plan

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


def fp8_specs(module: str, n: int, k: int, *, input_scale: bool) -> list[TensorSpec]:
    """The tensors of one FP8 layer [n, k] with one scale."""
    specs = [TensorSpec(f"{module}.weight", "F8_E4M3", (n, k)), TensorSpec(f"{module}.weight_scale", "F32", ())]
    return [*specs, TensorSpec(f"{module}.input_scale", "F32", ())] if input_scale else specs


def kv_specs(attn_prefix: str) -> list[TensorSpec]:
    """The FP8 KV cache's scales of one attention layer."""
    names = (f"{attn_prefix}.k_proj.k_scale", f"{attn_prefix}.v_proj.v_scale")
    return [TensorSpec(name, "F32", ()) for name in names]


def write_configs(
    folder: Path, raw_config: dict[str, Any], plan: Plan, input_scales: bool, kv_algo: str | None
) -> None:
    """hf_quant_config.json, and config.json with the same facts as its quantization_config.

    One format for all: its name and what is excluded. Several (MIXED_PRECISION): the format of each module; modules
    that are not named are plain.
    """
    algo = plan.algo(input_scales)
    record: dict[str, Any] = {"quant_algo": algo, "kv_cache_quant_algo": kv_algo}
    section: dict[str, Any] = {}
    if algo == "MIXED_PRECISION":
        words = {"nvfp4": "NVFP4" if input_scales else "W4A16_NVFP4", "fp8": "FP8"}
        layers = {module: _layer_record(words[stored]) for module, stored in plan.formats.items()}
        record["quantized_layers"] = layers
        section["config_groups"] = {
            f"group_{i}": {**_group(word), "targets": sorted(m for m in layers if layers[m]["quant_algo"] == word)}
            for i, word in enumerate(dict.fromkeys(layer["quant_algo"] for layer in layers.values()))
        }
        section |= {"quantized_layers": layers, "ignore": []}
    else:
        if algo != "FP8":
            record["group_size"] = BLOCK
        record["exclude_modules"] = list(plan.plain)
        section["config_groups"] = {"group_0": {**_group(algo), "targets": ["Linear"]}}
        section["ignore"] = list(plan.plain)
    section |= {"quant_algo": algo, "producer": PRODUCER, "quant_method": "modelopt"}
    if kv_algo == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    write_json(folder / HF_QUANT, {"producer": PRODUCER, "quantization": record})
    write_json(folder / CONFIG, {**raw_config, "quantization_config": section})


def _layer_record(algo: str) -> dict[str, Any]:
    return {"quant_algo": algo} if algo == "FP8" else {"quant_algo": algo, "group_size": BLOCK}


def _group(algo: str) -> dict[str, Any]:
    """What `config_groups` says of one format."""
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8 if algo == "FP8" else 4, "type": "float"}
    if algo != "FP8":
        numbers["group_size"] = BLOCK
    return {"weights": numbers} if algo == "W4A16_NVFP4" else {"input_activations": dict(numbers), "weights": numbers}


def copy_companions(source: Path, out: Path) -> None:
    """Copy the files of `COMPANIONS` that exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            with naming(out / name):
                shutil.copyfile(source / name, out / name)
