"""What a plan needs of a checkpoint, from config.json and the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvfp4_runtime.engine.cost import ModelCost

_EMBEDDING, _HEAD, _EXPERTS = "embed_tokens", "lm_head", ".experts."
_STATES = ("hybrid_override_pattern", "mamba_num_heads", "layers_block_type")


@dataclass(frozen=True)
class Weights:
    """A checkpoint, or one rank's part of it.

    kv_token_bytes   of all layers, with a BF16 cache
    embedding_bytes  of `weight_bytes`; every rank has all of it
    num_kv_heads     1 where one latent vector is kept for all heads
    """

    cost: ModelCost
    weight_bytes: int
    kv_token_bytes: float
    max_model_len: int
    embedding_bytes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    def part(self, ranks: int) -> Weights:
        """What each of `ranks` holds and does, as docs/scale-out.md splits it, taken to be even: matrices, experts,
        heads and the vocabulary of the head. A key-value head, or a latent vector, is whole on each rank that needs it.

        ValueError for more ranks than heads.
        """
        if not 1 <= ranks <= self.num_heads:
            raise ValueError(f"--tensor-parallel-size: expected 1 to {self.num_heads}, its heads, found {ranks}")
        kept = max(1 / ranks, 1 / self.num_kv_heads)
        cost = replace(
            self.cost,
            token_flops=self.cost.token_flops / ranks,
            step_bytes=self.cost.step_bytes / ranks,
            expert_bytes=self.cost.expert_bytes / ranks,
            row_flops=self.cost.row_flops / ranks,
            head_bytes=self.cost.head_bytes / ranks,
            pair_flops=self.cost.pair_flops / ranks,
            kv_layer_bytes=self.cost.kv_layer_bytes * kept,
        )
        split = (self.weight_bytes - self.embedding_bytes) / ranks
        return replace(
            self, cost=cost, weight_bytes=round(split + self.embedding_bytes), kv_token_bytes=self.kv_token_bytes * kept
        )


def read_weights(folder: Path) -> Weights:
    """ValueError for a folder that is no checkpoint, or of a kind whose steps are not modelled."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json; expected a model folder")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found := next((name for name in _STATES if name in config), None):
        raise ValueError(f"{folder}: {found} in config.json: models with states per sequence are not modelled yet")
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    values, attended = _kept_values(config, heads)
    sizes: dict[str, list[float]] = {}  # part -> [bytes, weights]
    for name, size, count in _tensors(folder):
        part = _part(name)
        total = sizes.setdefault(part, [0.0, 0.0])
        total[0] += size
        total[1] += count
    head = sizes.get("head") or sizes.get("embedding") or [0.0, 0.0]
    body, experts = sizes.get("body", [0.0, 0.0]), sizes.get("experts", [0.0, 0.0])
    routed = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    share = int(config["num_experts_per_tok"]) / int(routed) if routed and experts[0] else 1.0
    cost = ModelCost(
        token_flops=2 * (body[1] + share * experts[1]),
        step_bytes=body[0],
        expert_bytes=experts[0],
        expert_share=share,
        row_flops=2 * head[1],
        head_bytes=head[0],
        pair_flops=2.0 * heads * attended,
        kv_layer_bytes=2.0 * values,
        windows={None: layers},
    )
    return Weights(
        cost,
        round(sum(size for size, _ in sizes.values())),
        2.0 * values * layers,
        int(config.get("max_position_embeddings", 4096)),
        round(sizes.get("embedding", [0.0])[0]),
        int(config["hidden_size"]),
        layers,
        heads,
        1 if "kv_lora_rank" in config else int(config.get("num_key_value_heads") or heads),
    )


def _kept_values(config: dict[str, Any], heads: int) -> tuple[int, int]:
    """Values that one layer keeps of a token, and values that a head multiplies per pair of tokens."""
    if "kv_lora_rank" in config:
        rank, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
        return rank + rope, 2 * rank + rope
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * int(config.get("num_key_value_heads") or heads) * width, 2 * width


def _part(name: str) -> str:
    if _HEAD in name:
        return "head"
    if _EMBEDDING in name:
        return "embedding"
    return "experts" if _EXPERTS in name else "body"


def _tensors(folder: Path) -> list[tuple[str, int, float]]:
    """(name, bytes, weights) of every tensor. Packed bytes hold two weights; scales hold none."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 << 20:
                raise ValueError(f"{file}: its header claims {length} bytes; this is no safetensors file")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            holds = 0 if "scale" in name else 2 if entry["dtype"] == "U8" else 1
            found.append((name, end - begin, count * holds))
    if not found:
        raise ValueError(f"{folder} holds no *.safetensors; expected a model folder")
    return found
