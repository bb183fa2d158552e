"""Architectures, and the class that runs each. Importing this needs no torch; loading a model does."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig, ModelImpl
from nvfp4_runtime.errors import ConfigError, UnsupportedFormatError
from nvfp4_runtime.models import vision

if TYPE_CHECKING:
    from torch import Tensor

    from nvfp4_runtime.batch import ForwardBatch
    from nvfp4_runtime.cache.specs import CacheSpec
    from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
    from nvfp4_runtime.kernels.registry import Kernels

logger = logging.getLogger(__name__)

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
    "MinistralForCausalLM": "llama",
    "Ministral3ForCausalLM": "llama",
    "Phi3ForCausalLM": "llama",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma4ForCausalLM": "gemma4",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_next",
    "Qwen3_5MoeForCausalLM": "qwen3_next",
    "MiniMaxM2ForCausalLM": "llama",
    "GptOssForCausalLM": "gpt_oss",
    "NemotronHForCausalLM": "nemotron_h",
    "DeciLMForCausalLM": "decilm",
}

# Tensors that no model reads, and why that is right.
HARMLESS = {
    "*.rotary_emb.inv_freq": "computed from config.json",
    "mtp.*": "predicts further tokens; speculation is not done here",
    "*.q_scale": "for attention in FP8; queries are not quantised here",
    "*.prob_output_scale": "for attention in FP8; probabilities are not quantised here",
}


class Model(Protocol):
    """What the engine needs of a decoder.

    kv_specs  what each layer wants cached, in the order of batch.kv
    """

    config: ModelConfig
    kv_dtype: KVDtype
    kv_specs: tuple[CacheSpec, ...]

    def forward(self, batch: ForwardBatch) -> Tensor: ...

    def hidden(self, batch: ForwardBatch) -> Tensor: ...


def harmless(config: ModelConfig) -> dict[str, str]:
    """Patterns of tensors that this model leaves unread, and why."""
    drafts = range(config.num_layers, config.num_layers + config.num_draft_layers)
    further = {f"{config.root}.layers.{i}.*": "predicts further tokens; speculation is not done here" for i in drafts}
    return HARMLESS | further | vision.unread(config)


def describe_model(raw: Mapping[str, Any], impl: ModelImpl = "auto") -> ModelConfig:
    """What config.json says, as the implementation that will run it reads it. See `load_model` for the errors."""
    if chosen_impl(raw, impl) == "transformers":
        from nvfp4_runtime.models.from_transformers.config import generic_config

        return generic_config(raw)
    from nvfp4_runtime.models.hf_config import parse_model_config

    return parse_model_config(vision.text_config(raw))


def chosen_impl(raw: Mapping[str, Any], impl: ModelImpl = "auto") -> Literal["native", "transformers"]:
    """Which implementation runs this config.json; "auto": ours where there is one."""
    if impl != "auto":
        return impl
    from nvfp4_runtime.models.hf_config import parse_architecture

    return "native" if parse_architecture(vision.text_config(raw)) in ARCHITECTURES else "transformers"


def load_model(
    ckpt: Checkpoint,
    kernels: Kernels,
    kv_dtype: KVDtype | Literal["auto"] = "auto",
    max_positions: int | None = None,
    lm_head_dtype: HeadDtype = "auto",
    impl: ModelImpl = "auto",
) -> Model:
    """Build the model that config.json names, every tensor used or excused.

    kv_dtype       "auto": FP8 or NVFP4 where the checkpoint asks for such a cache, else the activations' type
    max_positions  the longest sequence to prepare for; None: the config's max_position_embeddings
    lm_head_dtype  other than "auto": a plain head is brought to this format at load (see layers/head.py)
    impl           "native": ours; "transformers": that library's module on our kernels; "auto": ours if there is one

    Raises UnsupportedFormatError for an unknown architecture or feature, and the checkpoint's own errors.
    """
    from nvfp4_runtime.models.hf_config import parse_architecture

    chosen = chosen_impl(ckpt.raw_config, impl)
    architecture = parse_architecture(
        ckpt.raw_config if chosen == "transformers" else vision.text_config(ckpt.raw_config)
    )
    if chosen == "native" and architecture not in ARCHITECTURES:
        raise UnsupportedFormatError(
            f"config.json: architectures is {architecture!r}, which has no implementation here; known are "
            f"{', '.join(sorted(ARCHITECTURES))}; --model-impl transformers runs many others"
        )
    config = describe_model(ckpt.raw_config, chosen)
    kv_dtype = _kv_dtype(ckpt, kernels, config, kv_dtype)
    if chosen == "native":
        config = vision.located(config, ckpt)
    if config.vision_class:
        logger.info("%s: its language model alone is run, images are refused", config.vision_class)
    name = "from_transformers.model" if chosen == "transformers" else ARCHITECTURES[architecture]
    if chosen == "transformers":
        _require_transformers(architecture)
        logger.warning(
            "%s runs by transformers' module on our kernels and cache (--model-impl transformers): correct, not fast, "
            "and a request's last bits may depend on its company",
            architecture,
        )
    module = importlib.import_module(f"{__name__}.{name}")
    model: Model = module.Decoder(config, ckpt, kernels, kv_dtype, max_positions, lm_head_dtype)
    for pattern, reason in harmless(config).items():
        ckpt.excuse(pattern, reason)
    ckpt.finish()
    return model


def _kv_dtype(ckpt: Checkpoint, kernels: Kernels, config: ModelConfig, asked: KVDtype | Literal["auto"]) -> KVDtype:
    plain: KVDtype = "float32" if kernels.dtype == "float32" else "bfloat16"
    declared: dict[str | None, KVDtype] = {"FP8": "fp8", "NVFP4": "nvfp4"}
    if config.mla is None:
        return declared.get(ckpt.quant.kv_algo, plain) if asked == "auto" else asked
    if asked in ("fp8", "nvfp4"):
        raise ConfigError(
            f"--kv-cache-dtype {asked} was asked for, and latent attention ({config.architecture}) keeps its cache in "
            "the activations' type; leave the flag out",
            "--kv-cache-dtype",
        )
    return plain


def _require_transformers(architecture: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedFormatError(
            f"{architecture} has no implementation here and the package transformers, which may have one, is not "
            "installed: pip install 'nvfp4-runtime[transformers]'"
        )
