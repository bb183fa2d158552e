"""What is quantised, what stays as it is, and which layers share a tensor scale."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from nvfp4_runtime.checkpoint.detect import is_excluded
from nvfp4_runtime.checkpoint.shards import PLAIN, TensorInfo
from nvfp4_runtime.models.vision import text_config, towers
from nvfp4_runtime.nvfp4.codec import BLOCK

# Methods that need a calibration text, beside those of nvfp4/block_scales.py that do not.
CalibratedMethod = Literal["awq", "gptq", "awq+gptq"]
CALIBRATED_METHODS: tuple[CalibratedMethod, ...] = get_args(CalibratedMethod)

# Modules that stay plain whatever the model: small, sensitive, or looked up rather than multiplied.
STAY_PLAIN = (
    "lm_head",
    "*embed_tokens*",
    "*embeddings*",
    "*norm*",
    "*.mlp.gate",  # the router of a mixture of experts
    "*.block_sparse_moe.gate",
    "*.mixer.gate",
    "*router*",
    "*shared_expert_gate",
    "*conv1d*",
    "*.linear_attn.in_proj_a",
    "*.linear_attn.in_proj_b",
    "*.linear_attn.in_proj_ba",
    "*visual*",
    "*vision*",
    "mtp*",
    "*.mtp.*",
)

# What NVIDIA's published checkpoints of a family leave plain beside that.
_FAMILY_PLAIN = {
    "DeepseekV3ForCausalLM": ("*.self_attn.*",),
    "Glm4MoeForCausalLM": ("*.self_attn.*",),
    "MiniMaxM2ForCausalLM": ("*.self_attn.*",),
}

# Layers that read the same input share weight_scale_2 (the largest) and input_scale, so that one GEMM can serve them.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
_GROUP_OF = {leaf: f"{{{','.join(names)}}}" for names in _SIBLINGS for leaf in names}


def family_exclusions(raw_config: Mapping[str, Any]) -> tuple[str, ...]:
    """fnmatch patterns of what stays plain in this architecture, as NVIDIA publishes it; () where nothing is special.

    NemotronH: every attention layer, and the Mamba layer before each (Nemotron 3 Nano). Of vision-language classes:
    the towers, and what their language model has.
    """
    return (*towers(raw_config), *_text_exclusions(text_config(raw_config)))


def _text_exclusions(raw_config: Mapping[str, Any]) -> tuple[str, ...]:
    names = raw_config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name != "NemotronHForCausalLM":
        return _FAMILY_PLAIN.get(str(name), ())
    pattern = str(raw_config.get("hybrid_override_pattern", ""))
    chosen = {i for at, kind in enumerate(pattern) if kind == "*" for i in (at, at - 1) if i >= 0}
    return tuple(f"*.layers.{i}.mixer.*" for i in sorted(chosen) if pattern[i] in "*M")


def module_of(name: str) -> str:
    """`a.b.weight` -> `a.b`."""
    return name.rpartition(".")[0]


def is_matrix(info: TensorInfo) -> bool:
    """Whether the tensor is a plain weight matrix or a stack of them: what an exclusion list has to speak about."""
    return info.name.endswith(".weight") and len(info.shape) >= 2 and info.dtype in PLAIN


def why_plain(info: TensorInfo, exclude: Sequence[str]) -> str | None:
    """Why this tensor stays as it is, or None when the recipe quantises it.

    Quantised are the two-dimensional `.weight`s inside decoder blocks (`....layers.<i>....`) that neither the recipe
    nor the caller's fnmatch patterns `exclude`.
    """
    module = module_of(info.name)
    if not is_matrix(info):
        return "no weight matrix"
    if len(info.shape) != 2:
        return "not two-dimensional"
    if not re.search(r"(^|\.)(layers|h|blocks)\.\d+\.", module):
        return "outside the decoder blocks"
    if is_excluded(module, STAY_PLAIN):
        return "kept plain by the recipe"
    if is_excluded(module, exclude):
        return "excluded by the caller"
    if not info.shape[0] or not info.shape[1]:
        return f"not two-dimensional in fact: {info.shape[0]} x {info.shape[1]} holds no weight"
    if info.shape[1] % BLOCK:
        return f"input features ({info.shape[1]}) no multiple of {BLOCK}"
    return None


def fused_group(module: str) -> str:
    """A key that is equal for modules sharing one input: `...self_attn.k_proj` -> `...self_attn.{q_proj,...}`."""
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_GROUP_OF.get(leaf, leaf)}"
