"""Qwen3-Next and Qwen3.5: three layers of gated delta nets, then one of gated attention; a feed-forward or a mixture of
experts in each. Norms' weights are stored less 1."""

from __future__ import annotations

from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import CacheSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype, KVDtype, ModelConfig
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.gated_attention import GatedAttention
from nvfp4_runtime.layers.gated_delta import GatedDeltaNet
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.moe import MoE
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.models.stack import Stack, attention_spec


class Decoder(Stack):
    """As models/llama.py's Decoder.

    kv_specs  states of the delta nets, keys and values of the layers of attention, in layer order
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
        super().__init__(config, ckpt, kernels, kv_dtype, max_positions)
        cos, sin = self.rope_tables(kernels)
        layers = [DecoderLayer(ckpt, kernels, config, i, cos, sin, kv_dtype) for i in range(config.num_layers)]
        self.layers = layers
        self.kv_specs = tuple(layer.spec for layer in layers)
        self.end(ckpt, kernels, lm_head_dtype)


class DecoderLayer:
    """norm, delta net or attention, norm, feed-forward or experts.

    spec  what it keeps between steps
    """

    spec: CacheSpec

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
        assert config.delta is not None
        prefix, hidden, eps = f"{config.root}.layers.{layer_id}", config.hidden_size, config.rms_norm_eps
        self.input_norm, self.post_attention_norm = (
            RMSNorm(ckpt, kernels, f"{prefix}.{name}_layernorm", hidden, eps, zero_centred=config.zero_centred)
            for name in ("input", "post_attention")
        )
        self.mixer: GatedDeltaNet | GatedAttention
        if config.delta.layers[layer_id]:
            name = f"{prefix}.linear_attn"
            self.mixer = GatedDeltaNet(ckpt, kernels, config.delta, hidden, eps, name, layer_id)
            self.spec = self.mixer.spec
        else:
            name = f"{prefix}.self_attn"
            self.mixer = GatedAttention(ckpt, kernels, config, name, cos, sin, kv_dtype, layer_id)
            self.spec = attention_spec(ckpt, config, layer_id, name)
        self.mlp: MLP | MoE
        if config.moe is not None and config.moe.layers[layer_id]:
            self.mlp = MoE(ckpt, kernels, hidden, config.moe, f"{prefix}.mlp")
        else:
            self.mlp = MLP(ckpt, kernels, hidden, config.intermediate_size, f"{prefix}.mlp")

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same for the next layer."""
        normed, residual = self.input_norm(x, residual)
        normed, residual = self.post_attention_norm(self.mixer(normed, batch), residual)
        return self.mlp(normed, batch.adapters), residual
