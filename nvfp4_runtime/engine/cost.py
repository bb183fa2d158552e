"""What a step costs by arithmetic alone: operations and bytes of the model's matrices and of attention. Torch-free.

An estimate for comparing with what the machine can do: norms, rope, activations and sampling are left out, caches of
the processor too. A multiply-add is two operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nvfp4_runtime.cache.specs import AttentionSpec, CacheSpec, StateSpec
from nvfp4_runtime.config import ModelConfig
from nvfp4_runtime.engine.messages import LayerGroup
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled

HEAD = "lm_head"
EXPERTS = "experts."  # how groups of routed experts are named


@dataclass
class Work:
    """Operations, and bytes read and written."""

    flops: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0

    def add(self, other: Work) -> None:
        self.flops += other.flops
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written


@dataclass(frozen=True)
class ModelCost:
    """What one model takes per token, row and step.

    token_flops      matrices before the head, per new token; of routed experts only the top_k that a token passes
    step_bytes       weights before the head that every step reads
    expert_bytes     bytes of all routed experts; a step of t tokens is expected to read the share that top_k of
                     num_experts, drawn anew for each token, leave touched
    expert_share     top_k / num_experts
    row_flops        the head, per row of logits
    head_bytes       the head's weights, read by steps with at least one row
    pair_flops       attention of one layer, per new token and token it sees
    kv_layer_bytes   keys and values of one token in one layer
    state_bytes      all layers' states of one sequence, read and written in every step
    windows          layers by sliding window in tokens; None: full attention
    """

    token_flops: float = 0.0
    step_bytes: float = 0.0
    expert_bytes: float = 0.0
    expert_share: float = 1.0
    row_flops: float = 0.0
    head_bytes: float = 0.0
    pair_flops: float = 0.0
    kv_layer_bytes: float = 0.0
    state_bytes: float = 0.0
    windows: dict[int | None, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: ModelConfig, layers: list[LayerGroup], kv_specs: Sequence[CacheSpec], kv_dtype: str
    ) -> ModelCost:
        """Of a model as it was loaded. Latent attention is counted absorbed, as it runs."""
        share = 1.0 if config.moe is None else config.moe.top_k / config.moe.num_experts
        stored = [group for group in layers if group.bits_per_weight > 0]
        head = [group for group in stored if group.name == HEAD]
        experts = [group for group in stored if group.name.startswith(EXPERTS)]
        dense = [group for group in stored if group not in head and group not in experts]
        paged = [spec for spec in kv_specs if not isinstance(spec, StateSpec)]
        return cls(
            token_flops=2 * (_num_weights(dense) + share * _num_weights(experts)),
            step_bytes=_num_bytes(dense),
            expert_bytes=_num_bytes(experts),
            expert_share=share,
            row_flops=2 * _num_weights(head),
            head_bytes=_num_bytes(head),
            pair_flops=2.0 * config.num_heads * _attended(config),
            kv_layer_bytes=sum(spec.bytes_per_token(kv_dtype) for spec in paged) / len(paged),
            state_bytes=sum(spec.bytes_per_slot for spec in kv_specs if isinstance(spec, StateSpec)),
            windows=dict(Counter(spec.window if isinstance(spec, AttentionSpec) else None for spec in paged)),
        )

    def of_step(self, schedule: Schedule) -> Work:
        """One step's work. Every entry that samples is one row of logits."""
        tokens = schedule.num_tokens
        rows = sum(entry.samples for entry in schedule.entries)
        work = Work(
            flops=tokens * self.token_flops + rows * self.row_flops,
            bytes_read=self.step_bytes if tokens else 0.0,
            bytes_written=tokens * self.kv_layer_bytes * sum(self.windows.values()),
        )
        work.bytes_read += len(schedule.entries) * self.state_bytes
        work.bytes_written += len(schedule.entries) * self.state_bytes
        work.bytes_read += self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)
        work.bytes_read += self.head_bytes if rows else 0.0
        for window, num_layers in self.windows.items():
            for entry in schedule.entries:
                work.flops += num_layers * self.pair_flops * _pairs(entry, window)
                seen = entry.stop if window is None else min(entry.stop, window + entry.count - 1)
                work.bytes_read += num_layers * self.kv_layer_bytes * seen
        return work


def _attended(config: ModelConfig) -> int:
    """Values a head multiplies per pair of tokens: its key's and its value's."""
    if config.mla is not None:
        return 2 * config.mla.kv_lora_rank + config.mla.rope_dim
    return 2 * config.head_dim


def _num_bytes(groups: list[LayerGroup]) -> float:
    return float(sum(group.num_bytes for group in groups))


def _num_weights(groups: list[LayerGroup]) -> float:
    return sum(8 * group.num_bytes / group.bits_per_weight for group in groups)


def _pairs(entry: Scheduled, window: int | None) -> int:
    """(new token, token it sees) pairs: the token at position p sees p + 1, at most `window`."""
    first, last = entry.start + 1, entry.stop
    if window is None or last <= window:
        return (first + last) * entry.count // 2
    if first > window:
        return window * entry.count
    growing = window - first + 1
    return (first + window) * growing // 2 + window * (entry.count - growing)
