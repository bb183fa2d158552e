"""The LM head: the embedding matrix where the two are tied, else its own weight; quantised at load where asked."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, ModelConfig
from nvfp4_runtime.errors import ConfigError, UnsupportedFormatError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear, linear_kernel, load_weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight

FLAG = "--lm-head-dtype"


def lm_head(
    ckpt: Checkpoint,
    kernels: Kernels,
    config: ModelConfig,
    embedding: Tensor,
    dtype: HeadDtype,
    placed: Tensor | None = None,
) -> Linear:
    """The layer from the last hidden state to logits, float32 [M, vocab].

    embedding  as the checkpoint stores it
    placed     the same on the kernels' device, for a head that is this very tensor

    dtype  "auto": as stored. "fp8": E4M3 under a scale per row. "nvfp4": `max` recipe, never W4A4, since nothing
           calibrated its input. "bf16": a plain head of another type is rounded

    Look-ups of a tied embedding keep reading the stored tensor. Raises ConfigError for a head that is already quantised
    in another format, or cannot be.
    """
    stored = _stored(ckpt, config, embedding)
    weight = _converted(kernels, stored, dtype)
    made_from = None if weight.format == stored.format else stored.format
    if placed is not None and isinstance(weight, DenseWeight) and weight.weight is embedding:
        weight = DenseWeight(placed)  # one copy serves look-ups and logits
    return Linear([linear_kernel(kernels, "lm_head", weight, [config.head], made_from, out_dtype="float32")])


def _stored(ckpt: Checkpoint, config: ModelConfig, embedding: Tensor) -> Weight:
    name = f"{config.head}.weight"
    own = ckpt.has(name)
    if not config.tie_word_embeddings or ckpt.has(f"{config.head}.weight_scale"):
        return load_weight(ckpt, config.head, config.vocab_size, config.hidden_size, bias=False)
    if own and not torch.equal(ckpt.tensor(name, tuple(embedding.shape)), embedding):
        raise UnsupportedFormatError(
            f"{name} differs from {config.root}.embed_tokens.weight although config.json ties them "
            "(tie_word_embeddings true); set it to false if the head is meant, or delete the tensor"
        )
    return DenseWeight(embedding)


def _converted(kernels: Kernels, stored: Weight, dtype: HeadDtype) -> Weight:
    if dtype in ("auto", stored.format):
        return stored
    if not isinstance(stored, DenseWeight):
        raise ConfigError(
            f"{FLAG} {dtype} was asked for, and the checkpoint stores its head as {stored.format}; "
            f"use {FLAG} auto, or a checkpoint with a plain head",
            FLAG,
        )
    if dtype == "bf16":
        return DenseWeight(stored.weight.to(torch.bfloat16), stored.bias)
    try:
        return kernels.quantize(stored, "fp8" if dtype == "fp8" else "nvfp4")
    except ValueError as error:
        raise ConfigError(f"{FLAG} {dtype}: {error}; use {FLAG} auto", FLAG) from error
