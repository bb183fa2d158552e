"""compressed-tensors' quantization_config in ModelOpt's words: which groups of layers are stored in which format."""

from __future__ import annotations

from typing import Any

from nvfp4_runtime.config import QuantConfig

# What `format` may be, at the top or in a group. The tensors say which of them a layer is really in.
FORMATS = (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
    "",
)
# Schemes by name, where a group is given as a list of targets instead of an object.
_PRESETS = {
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
    "MXFP4": "MXFP4",
    "MXFP4A16": "MXFP4",
    "FP8": "FP8",
    "FP8_DYNAMIC": "FP8",
    "FP8_BLOCK": "FP8",
}


def quant_config(declared: dict[str, Any], ignore: tuple[str, ...], notes: list[str]) -> QuantConfig:
    """The section as a QuantConfig; whatever changes the arithmetic and has no code here goes to `unsupported`."""
    layers: list[tuple[str, str]] = []
    unsupported = _features(declared)
    groups = declared.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        targets, algo = _group(name, group)
        if (form := _word(group, "format")) not in FORMATS:
            unsupported.append(f"the compressed-tensors format {form!r}")
        if algo is None:
            continue
        layers += [(target, algo) for target in targets]
    algos = {algo for _, algo in layers}
    scheme = declared.get("kv_cache_scheme")
    kv = scheme.upper() if isinstance(scheme, str) else kv_algo(scheme) if isinstance(scheme, dict) else ""
    if isinstance(scheme, dict) and scheme.get("dynamic") is True:
        notes.append("the KV cache's scales are declared dynamic; here they are the stored ones, or 1.0")
    version = _word(declared, "version")
    return QuantConfig(
        method="compressed-tensors",
        algo=algos.pop() if len(algos) == 1 else "MIXED_PRECISION" if algos else None,
        kv_algo=kv or None,
        exclude=ignore,
        producer=f"compressed-tensors {version}" if version else "",
        notes=tuple(notes),
        layers=tuple(layers),
        unsupported=tuple(unsupported),
    )


def kv_algo(scheme: dict[str, Any]) -> str:
    """A KV cache's scheme: "FP8", or words that name what it is instead."""
    bits, kind, strategy = scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy")
    if (bits, kind) != (8, "float"):
        return f"{kind} {bits}-bit".upper()
    return "FP8" if strategy in (None, "tensor") else f"FP8 ({strategy} scales)"


def _features(declared: dict[str, Any]) -> list[str]:
    found = []
    transform = declared.get("transform_config")
    if any(transform.values()) if isinstance(transform, dict) else transform:
        found.append(f"a transform_config ({str(transform)[:80]}): rotations that must be applied at run time")
    sparsity = declared.get("sparsity_config")
    if isinstance(sparsity, dict) and _word(sparsity, "format") not in ("", "dense"):
        found.append(f"a sparsity_config ({_word(sparsity, 'format')}): compressed sparse weights")
    if declared.get("moe_sparsity_config"):
        found.append("a moe_sparsity_config")
    if (form := _word(declared, "format")) not in FORMATS:
        found.append(f"the compressed-tensors format {form!r}")
    return found


def _group(name: Any, group: Any) -> tuple[list[str], str | None]:
    """A group's targets, and its algorithm in ModelOpt's words; None where it quantises no weights."""
    if isinstance(group, list):
        return [t for t in group if isinstance(t, str)], _PRESETS.get(str(name).upper(), str(name).upper())
    if not isinstance(group, dict):
        return [], None
    targets = group.get("targets")
    weights = group.get("weights")
    if not isinstance(targets, list) or not isinstance(weights, dict):
        return [], None
    bits, kind = weights.get("num_bits"), _word(weights, "type")
    if (bits, kind) == (4, "float"):
        mx = weights.get("group_size") == 32 or _word(group, "format").startswith("mxfp4")
        algo = "MXFP4" if mx else "NVFP4" if group.get("input_activations") else "W4A16_NVFP4"
    else:
        algo = "FP8" if (bits, kind) == (8, "float") else f"{kind}{bits}".upper()
    return [t for t in targets if isinstance(t, str)], algo


def _word(place: Any, key: str) -> str:
    value = place.get(key) if isinstance(place, dict) else None
    return value if isinstance(value, str) else ""
