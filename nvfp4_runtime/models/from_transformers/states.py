"""Layers of a transformers model that keep states (delta nets, Mamba-2): their states live in our slots.

transformers hands a cache through the model; ours, made anew for each call, gives its layers copies of the sequences'
states and is read back after the call. Its attention layers keep nothing: the paged cache does (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.cache.specs import StateSpec
from nvfp4_runtime.models.from_transformers.attention import refused


def make_cache(config: Any) -> Any:
    """A transformers cache with a place for every layer, whose attention layers pass keys and values through."""
    from transformers import DynamicCache

    class PassingCache(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

    return PassingCache(config=config)


@dataclass(frozen=True)
class StatefulLayer:
    """One layer's states as transformers has them: shapes without the sequences' axis.

    conv       [channels, width], the last inputs of the convolution, oldest first
    recurrent  [heads, a, b]
    """

    conv: tuple[int, int]
    conv_dtype: torch.dtype
    recurrent: tuple[int, int, int]
    recurrent_dtype: torch.dtype

    @property
    def spec(self) -> StateSpec:
        """A slot keeps one column more than StateSpec's convolution would need: transformers' has its whole width."""
        channels, width = self.conv
        return StateSpec(*self.recurrent, conv_dim=channels, conv_width=width + 1)

    def load(self, layer: Any, state: StateLayer, slots: Tensor) -> None:
        """The states of `slots` into a layer of a cache."""
        layer.conv_states[0] = state.conv[slots].transpose(1, 2).to(self.conv_dtype).contiguous()
        layer.recurrent_states[0] = state.ssm[slots].to(self.recurrent_dtype)
        layer.conv_kernel_size[0] = self.conv[1]
        for done in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state):
            done[0] = True
        layer.dtype, layer.device = self.conv_dtype, state.conv.device

    def store(self, layer: Any, state: StateLayer, slots: Tensor) -> None:
        """What the call left in it, into the slots."""
        state.conv[slots] = layer.conv_states[0].transpose(1, 2).to(torch.float32)
        state.ssm[slots] = layer.recurrent_states[0].to(torch.float32)


def stateful_layers(cache: Any) -> dict[int, StatefulLayer]:
    """The layers that left states in `cache` after a call. Raises UnsupportedFormatError for states of other kinds."""
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    found: dict[int, StatefulLayer] = {}
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            continue
        if type(layer) is not LinearAttentionLayer or layer.number_of_states != 1:
            raise refused(f"layer {i} keeps a {type(layer).__name__}, which this fallback has no place for")
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        if conv is None or recurrent is None or conv.dim() != 3 or recurrent.dim() != 4:
            shapes = [None if part is None else list(part.shape) for part in (conv, recurrent)]
            raise refused(f"layer {i} keeps states of shapes {shapes}; expected [B, channels, width] and [B, H, a, b]")
        found[i] = StatefulLayer(
            (conv.shape[1], conv.shape[2]),
            conv.dtype,
            (recurrent.shape[1], recurrent.shape[2], recurrent.shape[3]),
            recurrent.dtype,
        )
    return found


def keeps_nothing(cache: Any, layer_id: int) -> bool:
    """Whether transformers says of a layer that it is a feed-forward and no more."""
    from transformers.cache_utils import DummyLayer

    return layer_id < len(cache.layers) and isinstance(cache.layers[layer_id], DummyLayer)


def calls_of(batch: ForwardBatch) -> list[list[int]]:
    """Sequences in the calls they run in: all that go on by one token together, every other one alone."""
    bounds = batch.cu_seqlens_q.tolist()
    firsts = batch.positions[batch.cu_seqlens_q[:-1].to(torch.int64)].tolist()
    decoding = [i for i, first in enumerate(firsts) if bounds[i + 1] - bounds[i] == 1 and first > 0]
    rest = [[i] for i in range(len(firsts)) if i not in set(decoding)]
    return ([decoding] if decoding else []) + rest


def part_of(batch: ForwardBatch, sequences: Sequence[int]) -> tuple[ForwardBatch, Tensor, list[int]]:
    """The batch of these sequences alone; its rows in the whole one; and where its logits belong among all logits."""
    bounds = batch.cu_seqlens_q.tolist()
    rows = [row for i in sequences for row in range(bounds[i], bounds[i + 1])]
    place = {row: at for at, row in enumerate(rows)}
    wanted = [(at, place[row]) for at, row in enumerate(batch.logits_rows.tolist()) if row in place]
    counts = [0]
    for i in sequences:
        counts.append(counts[-1] + bounds[i + 1] - bounds[i])
    chosen, index = torch.tensor(rows), torch.tensor(list(sequences))
    part = ForwardBatch(
        input_ids=batch.input_ids[chosen],
        positions=batch.positions[chosen],
        slot_mapping=batch.slot_mapping[chosen],
        block_tables=batch.block_tables[index].contiguous(),
        seq_lens=batch.seq_lens[index].contiguous(),
        cu_seqlens_q=torch.tensor(counts, dtype=torch.int32),
        logits_rows=torch.tensor([row for _, row in wanted], dtype=torch.int64),
        kv=batch.kv,
        max_query_len=max(b - a for a, b in pairwise(counts)),
        max_seq_len=batch.max_seq_len,
        state_slots=None if batch.state_slots is None else batch.state_slots[index],
    )
    return part, chosen, [at for at, _ in wanted]
