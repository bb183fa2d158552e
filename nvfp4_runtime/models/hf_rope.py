"""The rotary embedding that a config.json asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from nvfp4_runtime.config import RopeConfig
from nvfp4_runtime.models.config_values import LIMIT, Raw, count, number, optional_number, unsupported


def parse_rope(raw: Raw, max_position: int, share: float | None = None) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4).

    share  of a head's dimensions that turn, where the config does not say; None: all, and no config may say otherwise
    """
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(field, rope, "one set of values for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn") and "short_factor" in rope:
        kind = "longrope"  # as Phi-3's first releases called it
    if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise unsupported(f"{field}.rope_type", kind, "default, linear, llama3, yarn or longrope")
    partial = number(
        rope if rope.get("partial_rotary_factor") is not None else raw, "partial_rotary_factor", share or 1.0
    )
    if not 0 < partial <= 1 or (share is None and partial != 1):
        raise unsupported("partial_rotary_factor", partial, "1.0" if share is None else "more than 0, at most 1")
    if rope.get("mrope_section") is not None:
        raise unsupported(f"{field}.mrope_section", rope["mrope_section"], "no multimodal rope")
    place = rope if rope.get("rope_theta") else raw
    theta = number(place, "rope_theta", 10000.0)
    if theta <= 1:
        raise unsupported("rope_theta", theta, "more than 1")
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    # a few models keep the original length beside the rope fields; there it takes precedence
    original = (
        raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or max_position
    )
    if isinstance(original, bool) or not isinstance(original, int | float) or not 1 <= original <= LIMIT:
        raise unsupported(f"{field}.original_max_position_embeddings", original, "a positive number of tokens")
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_position / original
    numbers: dict[str, Any] = {"factor": factor}
    if kind == "llama3":
        numbers |= {name: rope.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LIMIT:
            raise unsupported(f"{field}.{name}", value, f"a positive number, as rope type {kind} needs")
        numbers[name] = float(value)
    if kind == "llama3" and numbers["low_freq_factor"] == numbers["high_freq_factor"]:
        raise unsupported(f"{field}.high_freq_factor", numbers["high_freq_factor"], "more than low_freq_factor")
    attention_factor = optional_number(rope, "attention_factor")
    if kind == "longrope" and attention_factor is None:
        stretch = numbers["factor"]
        attention_factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(max(original, 2)))
    return RopeConfig(
        theta=theta,
        kind=cast(Literal["linear", "llama3", "yarn", "longrope"], kind),
        original_max_position_embeddings=int(original),
        beta_fast=number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=number(rope, "beta_slow", 1.0) or 1.0,
        attention_factor=attention_factor,
        mscale=optional_number(rope, "mscale"),
        mscale_all_dim=optional_number(rope, "mscale_all_dim"),
        truncate=bool(rope.get("truncate", True)),
        partial_rotary_factor=partial,
        short_factor=_factors(rope, field, "short_factor") if kind == "longrope" else (),
        long_factor=_factors(rope, field, "long_factor") if kind == "longrope" else (),
        query_beta=number(rope, "llama_4_scaling_beta", 0.0),
        **numbers,
    )


def _factors(rope: Mapping[str, Any], field: str, name: str) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or not all(type(v) in (int, float) and 0 < v <= LIMIT for v in values):
        raise unsupported(f"{field}.{name}", values, "a list of positive numbers, as rope type longrope needs")
    return tuple(map(float, values))


def rotary_dim_as_share(raw: Raw) -> Raw:
    """`rotary_dim`, in dimensions of a head, as the share that the others' config.json have."""
    if raw.get("rotary_dim") is None:
        return raw
    return {**raw, "partial_rotary_factor": count(raw, "rotary_dim") / count(raw, "head_dim", 128)}
