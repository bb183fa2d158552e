"""The two synthetic Llama models that are measured, and what one token of them costs in bytes and operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NVFP4_BYTES = 0.5 + 1 / 16  # a code and a sixteenth of a scale byte, per weight
BF16_BYTES = 2.0


@dataclass(frozen=True)
class Shape:
    """A Llama: grouped-query attention, SwiGLU, untied head. `max_positions` leaves room for the 8k-context figures."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int = 32000
    max_positions: int = 10240

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear of a layer, by its name in a checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def layer_prefixes(self) -> Iterator[str]:
        return (f"model.layers.{i}" for i in range(self.layers))

    @property
    def num_linear(self) -> int:
        """Weights of all layers' linears: 2 operations each per token."""
        return self.layers * sum(n * k for n, k in self.linears().values())

    @property
    def num_head(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        return self.num_linear + 2 * self.num_head + (2 * self.layers + 1) * self.hidden

    def token_bytes(self, linear: float = NVFP4_BYTES, head: float = BF16_BYTES) -> float:
        """Bytes of weights that decoding one token touches, at so many bytes per weight. The embedding is one row."""
        return self.num_linear * linear + self.num_head * head

    def kv_bytes(self, tokens: int, per_value: float) -> float:
        """Bytes of keys and values that one decode step over `tokens` earlier ones reads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * per_value * tokens


SMALL = Shape("0.44B", hidden=1024, layers=24, heads=16, kv_heads=8, head_dim=64, mlp=4096)
LARGE = Shape("1.1B", hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192)
LOADED = Shape("1.2B", hidden=2048, layers=18, heads=32, kv_heads=8, head_dim=64, mlp=8192)  # loadtest/bench_load.py
SHAPES = {shape.name: shape for shape in (SMALL, LARGE)}
