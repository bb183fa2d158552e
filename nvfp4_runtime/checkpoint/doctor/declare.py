"""config.json and hf_quant_config.json rewritten so that they say one thing, and that what the tensors are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT, is_excluded
from nvfp4_runtime.checkpoint.doctor.case import Case
from nvfp4_runtime.checkpoint.doctor.measure import is_plain
from nvfp4_runtime.checkpoint.doctor.report import Change, Finding
from nvfp4_runtime.checkpoint.shards import load_json
from nvfp4_runtime.nvfp4.codec import BLOCK

_EXCLUSIONS = ("excluded-but-quantised", "declared-but-plain")


def declared(
    case: Case, found: Sequence[Finding], all_have_input: bool
) -> tuple[dict[str, Any], dict[str, Any] | None, list[Change]]:
    """The two files' new contents (None: there is no hf_quant_config.json), and what changed in them.

    found            the checkpoint's findings: without one about the configs they stay as they are
    all_have_input   whether every NVFP4 layer will have an input_scale
    """
    config = copy.deepcopy(case.config)
    record = load_json(case.folder / HF_QUANT) if (case.folder / HF_QUANT).exists() else None
    ids = {finding.id for finding in found}
    changes: list[Change] = []
    if case.quant.method not in ("none", "modelopt"):
        if ids & set(_EXCLUSIONS):
            config["quantization_config"]["ignore"] = _exclusions(case, changes)
        return config, record, changes
    if not ids & {*_EXCLUSIONS, "config-disagreement", "quantised-undeclared"}:
        return config, record, changes
    if not all(m.stored.dialect == "modelopt" and m.stored.format == "nvfp4" for m in case.layers if m.stored.block):
        return (
            config,
            record,
            changes,
        )  # mixed formats and other dialects need a declaration per layer: left to the author
    exclude = (
        _exclusions(case, changes) if case.quant.algo is None or ids & set(_EXCLUSIONS) else list(case.quant.exclude)
    )
    algo = "NVFP4" if all_have_input else "W4A16_NVFP4"
    has_kv = any(item.kind == "kv_scale" for item in case.loose)
    kv_algo = "FP8" if has_kv else case.quant.kv_algo
    if "config-disagreement" in ids or case.quant.algo is None:
        changes.append(
            Change(
                "quantised-undeclared" if case.quant.algo is None else "config-disagreement",
                CONFIG,
                f"both configs declare {algo}, {kv_algo or 'no'} KV cache, {len(exclude)} exclusion(s)",
                True,
            )
        )
    _write_section(config, algo, kv_algo, exclude)
    record = record if record is not None else {"producer": {"name": case.quant.producer or "unknown"}}
    section = record.setdefault("quantization", {})
    section |= {"quant_algo": algo, "kv_cache_quant_algo": kv_algo, "group_size": BLOCK, "exclude_modules": exclude}
    return config, record, changes


def _exclusions(case: Case, changes: list[Change]) -> list[str]:
    """Patterns that cover no quantised layer stay; what they leave uncovered of the plain layers is named exactly."""
    quantised = [m.name for m in case.layers if m.stored.block is not None]
    covers = {
        pattern: [name for name in quantised if matcher.match(name)] for pattern, matcher in case.patterns.items()
    }
    plain = [m.name for m in case.layers if is_plain(m.stored) and _is_matrix(case, m.stored.tensors.get("weight", ""))]
    kept = [pattern for pattern, names in covers.items() if not names]
    exclude = [*kept, *(name for name in plain if not is_excluded(name, kept))]
    gone, new = sorted(set(case.quant.exclude) - set(exclude)), sorted(set(exclude) - set(case.quant.exclude))
    if gone:
        what = f"exclusion(s) removed that cover quantised layers: {', '.join(gone[:6])}"
        changes.append(Change("excluded-but-quantised", CONFIG, what, True))
    if new:
        what = f"{len(new)} plain layer(s) excluded by name: {', '.join(new[:6])}"
        changes.append(Change("declared-but-plain", CONFIG, what, True))
    return exclude


def _is_matrix(case: Case, name: str) -> bool:
    info = case.shards.info(name)
    return info is not None and len(info.shape) == 2 and not name.endswith("norm.weight")


def _write_section(config: dict[str, Any], algo: str, kv_algo: str | None, exclude: list[str]) -> None:
    """quantization_config in ModelOpt's wording; keys it does not know stay."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        section = config["quantization_config"] = {}
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group: dict[str, Any] = {"weights": fp4, "targets": ["Linear"]}
    if algo == "NVFP4":
        group = {"input_activations": dict(fp4), **group}
    section |= {
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "quant_algo": algo,
        "quant_method": "modelopt",
    }
    section.pop("kv_cache_scheme", None)
    if kv_algo == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    elif kv_algo is not None:
        section["kv_cache_scheme"] = kv_algo
