"""What a checkpoint's JSON declares about quantisation: config.json and hf_quant_config.json to one QuantConfig.

ModelOpt may write the same facts into both, in two spellings: config.json says who wrote them (`quant_method`),
hf_quant_config.json is the fuller record. Where they contradict each other that is noted, never guessed away silently.
compressed-tensors' groups are brought to ModelOpt's words (see detect_ct.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime.checkpoint import detect_ct
from nvfp4_runtime.checkpoint.patterns import compiled
from nvfp4_runtime.checkpoint.shards import load_json
from nvfp4_runtime.config import QuantConfig
from nvfp4_runtime.errors import CheckpointError, UnsupportedFormatError

CONFIG = "config.json"
HF_QUANT = "hf_quant_config.json"

MODELOPT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
MIXED = "MIXED_PRECISION"
W4A8 = "W4A8_NVFP4_FP8"  # one block scale per 32 weights, FP8 activations
WEIGHT_ONLY = "W4A16_NVFP4"
# Each readable algorithm and the format its weights are stored in.
FORMAT_OF = {
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    WEIGHT_ONLY: "nvfp4",
    W4A8: "nvfp4",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "fp8",
    "FP8_PB_REAL": "fp8",
    "MXFP4": "mxfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
}
READABLE_METHODS = ("modelopt", "compressed-tensors", "fp8", "mxfp4")
READABLE_ALGOS = (*FORMAT_OF, MIXED)
READABLE_KV_ALGOS = ("FP8", "NVFP4")
INSTEAD = "quantise a BF16 copy with `nvfp4 quantize`, or export as ModelOpt or compressed-tensors NVFP4"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; CheckpointError when the folder is none of a model."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a local Hugging Face model folder with {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; expected a Hugging Face model folder")
    return load_json(folder / CONFIG)


def detect(folder: Path, config: dict[str, Any]) -> QuantConfig:
    """What the two files declare, in one spelling. Reads no weights and refuses nothing: see `check_readable`."""
    declared = _section(_declaration(config), folder / CONFIG)
    record: dict[str, Any] = {}
    producer: Any = declared.get("producer")
    if (folder / HF_QUANT).exists():
        whole = load_json(folder / HF_QUANT)
        record = _section(whole.get("quantization"), folder / HF_QUANT)
        producer = whole.get("producer", producer)
    if not declared and not record:
        mlx = config.get("quantization")
        if isinstance(mlx, dict) and "bits" in mlx:
            return QuantConfig(method="mlx", algo=text(mlx.get("mode")).upper() or None)
        return QuantConfig()
    method = _method(declared)
    if method == "modelopt":
        return _modelopt(declared, record, producer)
    notes: list[str] = []
    if record:
        notes.append(f"{HF_QUANT} is ModelOpt's and {CONFIG} declares quant_method {method!r}; took the latter")
    if method == "compressed-tensors":
        return detect_ct.quant_config(declared, name_list(declared.get("ignore")), notes)
    names = name_list(declared.get("modules_to_not_convert"))
    exclude = (*names, *(f"{name}.*" for name in names))  # what is named stays plain with all that is in it
    algo = {"fp8": "FP8", "mxfp4": "MXFP4"}.get(method)
    layers = (("Linear", "FP8"), ("Linear", "NVFP4")) if text(declared.get("moe_quant_algo")).upper() == "NVFP4" else ()
    return QuantConfig(method=method, algo=algo, exclude=exclude, notes=tuple(notes), layers=layers)


def check_readable(quant: QuantConfig, folder: Path) -> None:
    """Raise UnsupportedFormatError when the declared format has no reader here."""
    if quant.method == "none":
        return
    if quant.method not in READABLE_METHODS:
        raise UnsupportedFormatError(
            f"{folder} declares quant_method {quant.method!r}; this build reads ModelOpt, compressed-tensors, "
            f"DeepSeek's FP8, gpt-oss's MXFP4 and plain BF16, FP16 and FP32 checkpoints: {INSTEAD}"
        )
    if quant.unsupported:
        raise UnsupportedFormatError(f"{folder} declares {quant.unsupported[0]}: {INSTEAD}")
    if quant.algo is not None and quant.algo not in READABLE_ALGOS:
        raise UnsupportedFormatError(
            f"{folder} declares {_tool(quant)}'s {quant.algo}; this build reads {', '.join(READABLE_ALGOS)}: {INSTEAD}"
        )
    if quant.kv_algo is not None and quant.kv_algo not in READABLE_KV_ALGOS:
        raise UnsupportedFormatError(
            f"{folder} declares a {quant.kv_algo} KV cache; this build reads {' and '.join(READABLE_KV_ALGOS)} with "
            "one scale per tensor: export the model with such a cache, or with none"
        )
    if quant.group_size != 16 and FORMAT_OF.get(quant.algo or "") == "nvfp4" and quant.algo != W4A8:
        raise UnsupportedFormatError(
            f"{folder} declares {quant.algo} with group_size {quant.group_size}; NVFP4 has one scale per 16 weights"
        )


def is_excluded(module: str, patterns: Sequence[str]) -> bool:
    """Whether exclusion `patterns` (exact, fnmatch, "re:"; a container excludes what is below it) cover `module`."""
    return compiled(patterns).match(module)


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def name_list(value: Any) -> tuple[str, ...]:
    """A list of module names, each once; () for null. CheckpointError for anything else."""
    if value is None:
        return ()
    if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise CheckpointError(f"the exclusion list {str(value)[:80]!r} is not a list of module names")
    return tuple(dict.fromkeys(value))


def _declaration(config: dict[str, Any]) -> Any:
    """The quantisation section of config.json: its place and name have changed over the years."""
    places = [config]
    if isinstance(nested := config.get("text_config"), dict):
        places.append(nested)
    for place in places:
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return place[key]
    return None


def _method(declared: dict[str, Any]) -> str:
    method = text(declared.get("quant_method")).lower()
    if not method and "config_groups" in declared and "quant_algo" not in declared:
        return "compressed-tensors"  # early files say so in `format` only
    return "modelopt" if not method or method in MODELOPT_METHODS else method


def _tool(quant: QuantConfig) -> str:
    return "ModelOpt" if quant.method == "modelopt" else quant.method


def _section(value: Any, file: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"the quantisation section of {file} is a {type(value).__name__}; expected an object")
    return value


def _modelopt(declared: dict[str, Any], record: dict[str, Any], producer: Any) -> QuantConfig:
    notes: list[str] = []
    algo = _merge("algorithm", text(declared.get("quant_algo")).upper(), record, "quant_algo", notes)
    layers = _mixed_layers(declared, record, notes)
    if algo == MIXED and not layers:
        notes.append(f"{MIXED} is declared without quantized_layers; the tensors decide")
    return QuantConfig(
        method="modelopt",
        algo=algo,
        kv_algo=_merge("KV cache", _kv_scheme(declared), record, "kv_cache_quant_algo", notes),
        group_size=_group_size(declared, record, notes),
        exclude=_exclude(declared, record, notes),
        producer=_producer(producer),
        notes=tuple(notes),
        layers=layers,
    )


def _merge(what: str, declared: str, record: dict[str, Any], key: str, notes: list[str]) -> str | None:
    """The fuller record's word where it has one (null is a word), with a note when config.json says otherwise."""
    if key not in record:
        return declared or None
    recorded = text(record[key]).upper()
    if declared and declared != recorded:
        notes.append(f"{what}: {CONFIG} says {declared}, {HF_QUANT} says {recorded or 'none'}; took the latter")
    return recorded or None


def _kv_scheme(declared: dict[str, Any]) -> str:
    scheme = declared.get("kv_cache_scheme")
    if isinstance(scheme, str):  # NVFP4 is written as a bare word, FP8 as an object
        return scheme.upper()
    if isinstance(scheme, dict):
        return detect_ct.kv_algo(scheme)
    return text(declared.get("kv_cache_quant_algo")).upper()


def _mixed_layers(declared: dict[str, Any], record: dict[str, Any], notes: list[str]) -> tuple[tuple[str, str], ...]:
    found = [_algos(place.get("quantized_layers")) for place in (declared, record)]
    if found[0] and found[1] and found[0] != found[1]:
        differing = sorted(name for name in {*found[0], *found[1]} if found[0].get(name) != found[1].get(name))
        notes.append(
            f"quantized_layers: {CONFIG} and {HF_QUANT} differ in {', '.join(differing[:6])}; took {HF_QUANT}'s"
        )
    return tuple((found[1] or found[0]).items())


def _algos(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {name: text(layer.get("quant_algo")).upper() for name, layer in value.items() if isinstance(layer, dict)}


def _group_size(declared: dict[str, Any], record: dict[str, Any], notes: list[str]) -> int:
    groups = declared.get("config_groups")
    sizes = [declared.get("group_size")]
    if isinstance(groups, dict):
        sizes += [g["weights"].get("group_size") for g in groups.values() if _has_weights(g)]
    found = {size for size in [*sizes, record.get("group_size")] if type(size) is int}
    if len(found) > 1:
        notes.append(f"group size: {CONFIG} and {HF_QUANT} give {sorted(found)}; the tensors decide")
    chosen = record.get("group_size")
    return chosen if type(chosen) is int else min(found, default=16)


def _has_weights(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("weights"), dict)


def _exclude(declared: dict[str, Any], record: dict[str, Any], notes: list[str]) -> tuple[str, ...]:
    ignore, excluded = name_list(declared.get("ignore")), name_list(record.get("exclude_modules"))
    both = declared.get("ignore") is not None and record.get("exclude_modules") is not None
    if both and set(ignore) != set(excluded):
        differing = sorted(set(ignore) ^ set(excluded))
        notes.append(f"exclusions: {CONFIG} and {HF_QUANT} differ in {', '.join(differing[:6])}; took {HF_QUANT}'s")
    return excluded if record.get("exclude_modules") is not None else ignore


def _producer(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    return " ".join(part for part in (text(value.get("name")), text(value.get("version"))) if part)
