"""Plain model folders as transformers' modules: the teacher as it is, and what the student is built in."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError

logger = logging.getLogger(__name__)

INSTALL = "pip install 'nvfp4-runtime[train]'"
# What some families do between the head and the answer; our chunked loss multiplies hidden states with the head itself
_BETWEEN_HEAD_AND_ANSWER = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def load_plain(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal language model in `folder`, without dropout, nothing trainable.

    Raises ConfigError without transformers, UnsupportedFormatError for a model that it does not know or whose answers
    are not its head's, CheckpointError where the folder lacks weights, which transformers would make up.
    """
    transformers = _transformers()
    try:
        model: Any
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise UnsupportedFormatError(
            f"transformers cannot load {folder} as a causal language model: {error}"
        ) from error
    if lacking := sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}):
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} tensor(s) of its model, or has them in another shape, e.g. {lacking[0]}; "
            "expected every weight that config.json implies"
        )
    if surplus := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d tensor(s) that its model does not read, e.g. %s", folder, len(surplus), surplus[0])
    for name in _BETWEEN_HEAD_AND_ANSWER:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UnsupportedFormatError(
                f"{folder} sets {name}, which changes logits after the head; distillation does not do that yet"
            )
    model.requires_grad_(False)
    module: nn.Module = model.eval().to(device)
    return module


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"distillation needs transformers, which is not installed: {INSTALL}") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What enters the head for rows of token ids [B, T]; [B * T, H]."""
    out: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return out.reshape(-1, out.shape[-1])


def head_weight(model: Any) -> Tensor:
    """The head [V, H]; UnsupportedFormatError where it is more than a matrix."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise UnsupportedFormatError(f"expected a head without bias, found {head}")
    return head.weight


def empty_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model's modules without weights, on the meta device: layers can be filled one at a time."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def new_model(config: dict[str, Any]) -> nn.Module:
    """A model of this config.json with fresh random weights, float32."""
    transformers = _transformers()
    kind = dict(config)
    parsed = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(parsed, attn_implementation="sdpa")
    return model
