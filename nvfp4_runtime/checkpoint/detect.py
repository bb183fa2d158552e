"""What a checkpoint's JSON declares about quantisation: config.json and hf_quant_config.json to one QuantConfig.

Both files may carry the same facts in two spellings; config.json says who wrote them (`quant_method`),
hf_quant_config.json is the fuller record. Where they contradict each other that is noted, never guessed away silently.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime.checkpoint.shards import load_json
from nvfp4_runtime.config import QuantConfig
from nvfp4_runtime.errors import CheckpointError, UnsupportedFormatError

CONFIG = "config.json"
HF_QUANT = "hf_quant_config.json"

MODELOPT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
READABLE_ALGOS = ("NVFP4", "W4A16_NVFP4")
READABLE_KV_ALGOS = ("FP8",)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; CheckpointError when the folder is none of a model."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a local Hugging Face model folder with {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; expected a Hugging Face model folder")
    return load_json(folder / CONFIG)


def detect(folder: Path, config: dict[str, Any]) -> QuantConfig:
    """What the two files declare, in one spelling. Reads no weights and refuses nothing: see `check_readable`."""
    declared = _section(config.get("quantization_config"), folder / CONFIG)
    record: dict[str, Any] = {}
    producer: Any = declared.get("producer")
    if (folder / HF_QUANT).exists():
        whole = load_json(folder / HF_QUANT)
        record = _section(whole.get("quantization"), folder / HF_QUANT)
        producer = whole.get("producer", producer)
    if not declared and not record:
        return QuantConfig()
    notes: list[str] = []
    method = _text(declared.get("quant_method")).lower() or "modelopt"
    if method in MODELOPT_METHODS:
        method = "modelopt"
    return QuantConfig(
        method=method,
        algo=_merge("algorithm", _text(declared.get("quant_algo")).upper(), record, "quant_algo", notes),
        kv_algo=_merge("KV cache", _kv_scheme(declared), record, "kv_cache_quant_algo", notes),
        group_size=_group_size(declared, record, notes),
        exclude=_exclude(declared, record, notes),
        producer=_producer(producer),
        notes=tuple(notes),
    )


def check_readable(quant: QuantConfig, folder: Path) -> None:
    """Raise UnsupportedFormatError when the declared format has no reader here."""
    if quant.method == "none":
        return
    if quant.method != "modelopt":
        raise UnsupportedFormatError(
            f"{folder} declares quant_method {quant.method!r}; this build reads ModelOpt NVFP4 and plain "
            "BF16, FP16 and FP32 checkpoints"
        )
    if quant.algo is not None and quant.algo not in READABLE_ALGOS:
        raise UnsupportedFormatError(
            f"{folder} declares ModelOpt's {quant.algo}; this build reads {' and '.join(READABLE_ALGOS)}"
        )
    if quant.kv_algo is not None and quant.kv_algo not in READABLE_KV_ALGOS:
        raise UnsupportedFormatError(
            f"{folder} declares a {quant.kv_algo} KV cache; this build reads {' and '.join(READABLE_KV_ALGOS)}"
        )
    if quant.group_size != 16:
        raise UnsupportedFormatError(f"{folder} declares group_size {quant.group_size}; NVFP4 here means 16")


def is_excluded(module: str, patterns: Sequence[str]) -> bool:
    """Whether ModelOpt's exclusion `patterns` (fnmatch or exact; a container excludes what is below it) cover it."""
    return any(fnmatch.fnmatchcase(module, p) or module.startswith(f"{p}.") for p in patterns)


def _section(value: Any, file: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"the quantisation section of {file} is a {type(value).__name__}; expected an object")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _merge(what: str, declared: str, record: dict[str, Any], key: str, notes: list[str]) -> str | None:
    """The fuller record's word where it has one (null is a word), with a note when config.json says otherwise."""
    if key not in record:
        return declared or None
    recorded = _text(record[key]).upper()
    if declared and declared != recorded:
        notes.append(f"{what}: {CONFIG} says {declared}, {HF_QUANT} says {recorded or 'none'}; took the latter")
    return recorded or None


def _kv_scheme(declared: dict[str, Any]) -> str:
    scheme = declared.get("kv_cache_scheme")
    if isinstance(scheme, str):
        return scheme.upper()
    if isinstance(scheme, dict):
        bits, kind = scheme.get("num_bits"), scheme.get("type")
        return "FP8" if (bits, kind) == (8, "float") else f"{kind} {bits}-bit"
    return _text(declared.get("kv_cache_quant_algo")).upper()


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
    lists = [declared.get("ignore"), record.get("exclude_modules")]
    for value in lists:
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise CheckpointError(f"the exclusion list {str(value)[:80]!r} is not a list of module names")
    ignore, excluded = lists
    if ignore is not None and excluded is not None and set(ignore) != set(excluded):
        differing = sorted(set(ignore) ^ set(excluded))
        notes.append(f"exclusions: {CONFIG} and {HF_QUANT} differ in {', '.join(differing[:6])}; took {HF_QUANT}'s")
    chosen = excluded if excluded is not None else ignore
    return tuple(dict.fromkeys(chosen or ()))


def _producer(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    return " ".join(part for part in (_text(value.get("name")), _text(value.get("version"))) if part)
