"""Nemotron-H and Nemotron 3: layers that are one thing each, after one norm.

A Mamba-2 mixer, attention without rope, a plain feed-forward, or a mixture of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import BlockOps
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.mamba2 import Mamba2
from nvfp4_runtime.layers.mlp import PlainMLP
from nvfp4_runtime.layers.moe import MoE
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.models.stack import Stack


class Decoder(Stack):
    """Token ids in, float32 logits out; as models/llama.py's Decoder.

    kv_specs  keys and values of the layers of attention, states of the Mamba-2 layers, in layer order
    """

    def __init__(
        self,
        config: ModelConfig,
        ckpt: Checkpoint,
        kernels: Kernels,
        kv_dtype: KVDtype,
        max_positions: int | None = None,
        lm_head_dtype: HeadDtype = "auto",
    ) -> None:
        super().__init__(config, ckpt, kernels, kv_dtype, max_positions, embedding="embeddings")
        no_turn = kernels.place(torch.empty(self.max_positions, 0, dtype=torch.float32))
        specs: list[CacheSpec] = []
        self.layers: list[Layer] = []
        for i in range(config.num_layers):
            self.layers.append(
                Layer(ckpt, kernels, config, f"{config.root}.layers.{i}", i, no_turn, kv_dtype, len(specs))
            )
            if (spec := self.layers[-1].spec(ckpt)) is not None:
                specs.append(spec)
        self.kv_specs = tuple(specs)
        blocks = [BlockOps(layer.norm.op, layer.mixer.ops()) for layer in self.layers]
        self.end(ckpt, kernels, lm_head_dtype, blocks, norm="norm_f")


class Layer:
    """A norm, which first adds what came before to the residual stream, and what the layer is.

    no_turn      empty rope tables
    cache_index  its place in batch.kv, if it keeps anything
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: ModelConfig,
        prefix: str,
        layer_id: int,
        no_turn: Tensor,
        kv_dtype: KVDtype,
        cache_index: int,
    ) -> None:
        hidden, eps, name = config.hidden_size, config.rms_norm_eps, f"{prefix}.mixer"
        self.name, self.config = name, config
        self.norm = RMSNorm(ckpt, kernels, f"{prefix}.norm", hidden, eps)
        self.mixer: Mamba2 | Attention | PlainMLP | MoE
        match config.blocks[layer_id]:
            case "mamba":
                assert config.mamba is not None
                self.mixer = Mamba2(ckpt, kernels, config.mamba, hidden, eps, name, cache_index)
            case "attention":
                self.mixer = Attention(
                    ckpt, kernels, config, name, layer_id, no_turn, no_turn, kv_dtype, cache_index=cache_index
                )
            case "mlp":
                self.mixer = PlainMLP(ckpt, kernels, hidden, config.intermediate_size, name)
            case "moe":
                assert config.moe is not None
                self.mixer = MoE(ckpt, kernels, hidden, config.moe, name)

    def spec(self, ckpt: Checkpoint) -> CacheSpec | None:
        """What it keeps between steps."""
        if isinstance(self.mixer, Mamba2):
            return self.mixer.spec
        if not isinstance(self.mixer, Attention):
            return None
        scales = ckpt.kv_scales(self.name)
        k_scale, v_scale = scales or (1.0, 1.0)
        own, head_dim = self.mixer.num_kv_heads, self.config.head_dim
        return AttentionSpec(own, head_dim, None, k_scale, v_scale, scales is not None)

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        normed, residual = self.norm(x, residual)
        if isinstance(self.mixer, Mamba2 | Attention):
            return self.mixer(normed, batch), residual
        return self.mixer(normed, batch.adapters), residual
