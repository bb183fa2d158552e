"""Architectures, and the class that runs each. Importing this needs no torch; loading a model does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal

from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.errors import ConfigError, UnsupportedFormatError

if TYPE_CHECKING:
    from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
    from nvfp4_runtime.kernels.registry import Kernels
    from nvfp4_runtime.models.llama import Decoder

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2MoeForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "llama",
    "Glm4MoeForCausalLM": "llama",
    "Glm4MoeLiteForCausalLM": "llama",
    "DeepseekV3ForCausalLM": "llama",
}

# Tensors that no model reads, and why that is right.
HARMLESS = {
    "*.rotary_emb.inv_freq": "computed from config.json",
    "*.q_scale": "for attention in FP8; queries are not quantised here",
    "*.prob_output_scale": "for attention in FP8; probabilities are not quantised here",
}


def harmless(config: ModelConfig) -> dict[str, str]:
    """Patterns of tensors that this model leaves unread, and why."""
    drafts = range(config.num_layers, config.num_layers + config.num_draft_layers)
    return HARMLESS | {f"model.layers.{i}.*": "predicts further tokens; speculation is not done here" for i in drafts}


def load_model(
    ckpt: Checkpoint,
    kernels: Kernels,
    kv_dtype: KVDtype | Literal["auto"] = "auto",
    max_positions: int | None = None,
    lm_head_dtype: HeadDtype = "auto",
) -> Decoder:
    """Build the model that config.json names, every tensor used or excused.

    kv_dtype       "auto": FP8 or NVFP4 where the checkpoint asks for such a cache, else the activations' type
    max_positions  the longest sequence to prepare for; None: the config's max_position_embeddings
    lm_head_dtype  other than "auto": a plain head is brought to this format at load (see layers/head.py)

    Raises UnsupportedFormatError for an unknown architecture or feature, and the checkpoint's own errors.
    """
    from nvfp4_runtime.models.hf_config import parse_architecture, parse_model_config

    architecture = parse_architecture(ckpt.raw_config)
    if architecture not in ARCHITECTURES:
        raise UnsupportedFormatError(
            f"config.json: architectures is {architecture!r}, which has no model here; known are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    config = parse_model_config(ckpt.raw_config)
    if config.mla is not None and kv_dtype in ("fp8", "nvfp4"):
        raise ConfigError(
            f"--kv-cache-dtype {kv_dtype} was asked for, and latent attention ({architecture}) keeps its cache in the "
            "activations' type; leave the flag out",
            "--kv-cache-dtype",
        )
    if kv_dtype == "auto":
        plain: KVDtype = "float32" if kernels.dtype == "float32" else "bfloat16"
        declared: dict[str | None, KVDtype] = {"FP8": "fp8", "NVFP4": "nvfp4"}
        kv_dtype = plain if config.mla is not None else declared.get(ckpt.quant.kv_algo, plain)
    module = importlib.import_module(f"{__name__}.{ARCHITECTURES[architecture]}")
    model: Decoder = module.Decoder(config, ckpt, kernels, kv_dtype, max_positions, lm_head_dtype)
    for pattern, reason in harmless(config).items():
        ckpt.excuse(pattern, reason)
    ckpt.finish()
    return model
