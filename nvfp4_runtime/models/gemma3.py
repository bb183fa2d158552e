"""Gemma 3's text model: norms before and after each half of a layer, windows in all but every sixth layer, which turn
by another rotary embedding, and a feed-forward gated by GELU. Embeddings are multiplied by the root of their width."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.layers.rope import rope_tables
from nvfp4_runtime.models.stack import Stack, attention_spec


class Decoder(Stack):
    """As models/llama.py's Decoder."""

    def __init__(
        self,
        config: ModelConfig,
        ckpt: Checkpoint,
        kernels: Kernels,
        kv_dtype: KVDtype,
        max_positions: int | None = None,
        lm_head_dtype: HeadDtype = "auto",
    ) -> None:
        super().__init__(config, ckpt, kernels, kv_dtype, max_positions)
        # rounded as the model was trained: the embedding's type, not the stream's
        self.embedding_scale = float(torch.tensor(config.hidden_size**0.5).to(self.embedding.dtype))
        assert config.local_rope is not None
        ropes = {}
        for windowed, rope in ((True, config.local_rope), (False, config.rope)):
            cos, sin = rope_tables(rope, config.rotary_dim, self.max_positions)
            ropes[windowed] = kernels.place(cos), kernels.place(sin)
        self.layers = [
            DecoderLayer(ckpt, kernels, config, i, *ropes[window is not None], kv_dtype)
            for i, window in enumerate(config.layer_windows)
        ]
        self.kv_specs = tuple(
            attention_spec(ckpt, config, i, f"{config.root}.layers.{i}.self_attn") for i in range(config.num_layers)
        )
        self.end(ckpt, kernels, lm_head_dtype)


class DecoderLayer:
    """norm, attention, norm; norm, feed-forward, norm: the second of each keeps the type of the residual stream."""

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        layer_id: int,
        cos: Tensor,
        sin: Tensor,
        kv_dtype: KVDtype,
    ) -> None:
        prefix, hidden, stream = f"{config.root}.layers.{layer_id}", config.hidden_size, kernels.stream

        def norm(name: str, after: bool) -> RMSNorm:
            out_dtype, eps = stream if after else None, config.rms_norm_eps
            name = f"{prefix}.{name}_layernorm"
            return RMSNorm(ckpt, kernels, name, hidden, eps, zero_centred=config.zero_centred, out_dtype=out_dtype)

        self.input_norm = norm("input", after=False)
        self.attention = Attention(ckpt, kernels, config, f"{prefix}.self_attn", layer_id, cos, sin, kv_dtype)
        self.input_norm.feed(self.attention.qkv_proj, kernels, "qkv_proj")
        self.post_attention_norm = norm("post_attention", after=True)
        self.pre_feedforward_norm = norm("pre_feedforward", after=False)
        self.mlp = MLP(ckpt, kernels, hidden, config.intermediate_size, f"{prefix}.mlp", gate=config.gate)
        self.pre_feedforward_norm.feed(self.mlp.gate_up_proj, kernels, "gate_up_proj")
        self.post_feedforward_norm = norm("post_feedforward", after=True)

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        fed, residual = self.input_norm.fed(x, residual)
        x, _ = self.post_attention_norm(self.attention(fed, batch), None)
        fed, residual = self.pre_feedforward_norm.fed(x, residual)
        return self.post_feedforward_norm(self.mlp(fed, batch.adapters), None)[0], residual
