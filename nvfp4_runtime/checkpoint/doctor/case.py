"""Everything the checks look at, gathered once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nvfp4_runtime.checkpoint.declared import declared_algos, excluded
from nvfp4_runtime.checkpoint.doctor.expected import Expected
from nvfp4_runtime.checkpoint.doctor.files import LooseShards, some
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.report import Finding, Severity
from nvfp4_runtime.checkpoint.patterns import Patterns
from nvfp4_runtime.checkpoint.stored import Loose
from nvfp4_runtime.config import QuantConfig

# Modules that read one input and that engines therefore fuse into one matrix.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)")


@dataclass(frozen=True)
class Case:
    """A checkpoint after the pass over its bytes.

    config, quant  config.json, and what the two files declare
    layers         every module, measured
    loose          tensors of no module
    has_parent     whether layers were compared with a parent
    expected       what the architecture's model reads; None for one that is not served here
    refusal        why that model cannot do what config.json asks for
    """

    folder: Path
    config: dict[str, Any]
    quant: QuantConfig
    shards: LooseShards
    layers: Sequence[Measured]
    loose: Sequence[Loose]
    has_parent: bool
    expected: Expected | None = None
    refusal: str | None = None

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """config.json's description of the language model: a section of its own in models that also see or hear."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def by_name(self) -> dict[str, Measured]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def nvfp4(self) -> list[Measured]:
        """Layers stored soundly as NVFP4."""
        return [layer for layer in self.layers if layer.stored.format == "nvfp4"]

    @cached_property
    def siblings(self) -> list[tuple[Measured, ...]]:
        """Groups of layers that share an input, all parts present."""
        groups = []
        for layer in self.layers:
            parent, _, leaf = layer.name.rpartition(".")
            for names in SIBLINGS:
                if leaf == names[0]:
                    found = [self.by_name.get(f"{parent}.{name}") for name in names]
                    parts = tuple(part for part in found if part is not None)
                    if len(parts) == len(names):
                        groups.append(parts)
        return groups

    @cached_property
    def experts(self) -> dict[tuple[str, str], list[Measured]]:
        """Experts kept one by one, by (container, projection), e.g. ("model.layers.0.mlp.experts", "up_proj")."""
        groups: dict[tuple[str, str], list[Measured]] = {}
        for layer in self.layers:
            if (match := _EXPERT.fullmatch(layer.name)) is not None:
                groups.setdefault((match[1], match[3]), []).append(layer)
        return groups

    @cached_property
    def patterns(self) -> dict[str, Patterns]:
        """Every declared exclusion by itself."""
        return {pattern: Patterns((pattern,)) for pattern in self.quant.exclude}

    @cached_property
    def _declared(self) -> dict[str, tuple[str | None, frozenset[str]]]:
        """Per layer what `excluded_by` and `algos` answer: patterns are slow, models have ten thousands of layers."""
        found = {}
        for layer in self.layers:
            algos = declared_algos(self.quant, layer.name)
            found[layer.name] = (None if algos else self._excluded_by(layer.name), algos)
        return found

    def excluded_by(self, layer: str) -> str | None:
        """The declared pattern that keeps `layer` unquantised, or None."""
        return self._declared[layer][0]

    def algos(self, layer: str) -> frozenset[str]:
        """The algorithms declared for `layer`; none for a plain one."""
        return self._declared[layer][1]

    def _excluded_by(self, module: str) -> str | None:
        if not excluded(self.quant, module):
            return None
        # one that only covers another name of the module (its fused one, another root) is not found: that will do
        return next((text for text, pattern in self.patterns.items() if pattern.match(module)), "another name of it")


def expert_group(name: str) -> tuple[str, str] | None:
    """(container, projection) of an expert's module, or None."""
    match = _EXPERT.fullmatch(name)
    return (match[1], match[3]) if match is not None else None


def about(id: str, severity: Severity, layers: Iterable[Measured | str], what: str, remedy: str) -> tuple[Finding, ...]:
    """One finding over all of `layers`, or none where there are none: "3 layer(s) WHAT: a, b, c"."""
    names = tuple(layer if isinstance(layer, str) else layer.name for layer in layers)
    if not names:
        return ()
    return (Finding(id, severity, f"{len(names)} layer(s) {what}: {some(names)}", remedy, names),)
