"""Which module gets which format: decided from the headers alone, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nvfp4_runtime.checkpoint.detect import is_excluded
from nvfp4_runtime.checkpoint.shards import PLAIN, Shards, TensorInfo
from nvfp4_runtime.checkpoint.writer import TensorSpec
from nvfp4_runtime.errors import ConfigError, UnsupportedFormatError
from nvfp4_runtime.quantize import export, recipes

Format = Literal["nvfp4", "fp8"]


@dataclass(frozen=True)
class Group:
    """Modules of one format that read the same input; NVFP4 ones share weight_scale_2 and input_scale."""

    key: str
    stored: Format
    members: tuple[tuple[str, TensorInfo], ...]  # (module, its weight)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for module, _ in self.members)

    @property
    def num_weights(self) -> int:
        return sum(info.shape[0] * info.shape[1] for _, info in self.members)


@dataclass(frozen=True)
class Plan:
    """What becomes of every module.

    groups  what is quantised, in the order of the files
    plain   modules with matrices that stay as they are
    notes   what a person should know
    """

    groups: tuple[Group, ...]
    plain: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def formats(self) -> dict[str, Format]:
        return {module: group.stored for group in self.groups for module in group.modules}

    def algo(self, input_scales: bool) -> str:
        """ModelOpt's word for it."""
        stored = {group.stored for group in self.groups}
        if stored == {"nvfp4"}:
            return "NVFP4" if input_scales else "W4A16_NVFP4"
        return "FP8" if stored == {"fp8"} else "MIXED_PRECISION"

    def specs(self, shards: Shards, input_scales: bool, kv_modules: Sequence[str]) -> list[TensorSpec]:
        """Every tensor of the result."""
        formats, specs = self.formats, list[TensorSpec]()
        for info in shards:
            module = recipes.module_of(info.name)
            if module in formats and info.name.endswith(".weight"):
                n, k = info.shape
                make = export.layer_specs if formats[module] == "nvfp4" else export.fp8_specs
                specs += make(module, n, k, input_scale=input_scales)
            else:
                specs.append(TensorSpec(info.name, info.dtype, info.shape))
        for attn in kv_modules:
            specs += export.kv_specs(attn)
        return specs


def make_plan(
    shards: Shards,
    raw_config: Mapping[str, Any],
    exclude: Sequence[str] = (),
    fp8: Sequence[str] = (),
    chosen: Mapping[str, Format | None] | None = None,
) -> Plan:
    """Choose formats: the recipe's exclusions, the family's, the caller's `exclude`, then `fp8`, else NVFP4.

    exclude, fp8  fnmatch patterns of modules, or names of containers
    chosen        fused-group key -> format, or None to leave it plain: what a bits budget decided

    Raises UnsupportedFormatError for weights that are no plain floats, ConfigError when nothing is left to quantise.
    """
    members: dict[tuple[str, Format], list[tuple[str, TensorInfo]]] = {}
    plain: dict[str, None] = {"lm_head": None}  # listed even when tied, as ModelOpt does
    notes: list[str] = []
    family = recipes.family_exclusions(raw_config)
    for info in shards:
        module = recipes.module_of(info.name)
        if info.name.endswith(".weight") and info.dtype not in PLAIN:
            raise UnsupportedFormatError(
                f"{info.name} in {info.file.name} is {info}; quantising starts from {', '.join(PLAIN)} weights"
            )
        reason = recipes.why_plain(info, (*family, *exclude))
        stored: Format | None = None
        if reason is None:
            stored = "fp8" if is_excluded(module, fp8) else "nvfp4"
            stored = (chosen or {}).get(recipes.fused_group(module), stored)
        if stored is not None:
            members.setdefault((recipes.fused_group(module), stored), []).append((module, info))
        elif recipes.is_matrix(info):
            plain[module] = None
            if reason is not None and ("multiple" in reason or "two-dimensional" in reason):
                notes.append(f"{module} stays plain: {reason}")
    groups = tuple(Group(key, stored, tuple(each)) for (key, stored), each in members.items())
    known = [*plain, *(module for group in groups for module in group.modules)]
    for flag, patterns in (("exclusion", exclude), ("FP8 pattern", fp8)):
        notes += [
            f"the {flag} {pattern!r} matches no layer"
            for pattern in patterns
            if not any(is_excluded(module, (pattern,)) for module in known)
        ]
    if not groups:
        raise ConfigError(
            f"nothing in {shards.folder} would be quantised; check --exclude and that it is a decoder model", "SRC"
        )
    return Plan(groups, tuple(plain), tuple(notes))
