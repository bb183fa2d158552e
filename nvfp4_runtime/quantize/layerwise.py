"""A decoder's layers one at a time over a calibration text: in memory are one layer, its inputs, and the hidden states.

Every layer has four inputs of linear layers, in order: qkv, o, gate_up, down. `LayerRun` stops before each, so that
what reads it can be measured or replaced, and nothing is computed twice. In a mixture of experts the last two have many
readers: each expert reads the tokens that the router, which stays plain, sends it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, ForwardBatch, KVLayer
from nvfp4_runtime.cache.paged_kv import allocate
from nvfp4_runtime.cache.specs import AttentionSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.pages import release_pages
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.attention import Attention
from nvfp4_runtime.layers.mlp import MLP
from nvfp4_runtime.layers.moe import Inside, MoE
from nvfp4_runtime.layers.rope import rope_tables
from nvfp4_runtime.models import ARCHITECTURES
from nvfp4_runtime.models.hf_config import parse_architecture, parse_model_config
from nvfp4_runtime.models.hf_mla import LATENT
from nvfp4_runtime.models.llama import DecoderLayer, mixture_prefix
from nvfp4_runtime.nvfp4.weight import Weight
from nvfp4_runtime.quantize.stacks import UnstackedShards

WINDOW = 512  # tokens per sequence: long enough for attention to spread
STEP_TOKENS = 1024  # tokens per forward pass, whole sequences together: few passes, little memory
BLOCK_SIZE = 16

SITES = ("qkv", "o", "gate_up", "down")
SITE_MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def site_modules(layer_id: int, site: str) -> tuple[str, ...]:
    """The modules that read this input of layer `layer_id`."""
    return tuple(f"model.layers.{layer_id}.{name}" for name in SITE_MODULES[site])


def readers(walk: Walk, layer_id: int, site: str) -> list[tuple[str, ...]]:
    """The modules that read this input: one tuple; in a mixture one for the shared expert and one for each expert."""
    moe = walk.config.moe
    if site in ("qkv", "o") or moe is None or not moe.layers[layer_id]:
        return [site_modules(layer_id, site)]
    prefix = mixture_prefix(walk.ckpt, f"model.layers.{layer_id}")
    first = walk.ckpt.has(f"{prefix}.experts.0.w1.weight")
    names = {"gate_up": ("w1", "w3"), "down": ("w2",)} if first else _PROJECTIONS
    found = [tuple(f"{prefix}.experts.{e}.{name}" for name in names[site]) for e in range(moe.num_experts)]
    if moe.shared_size:
        shared = f"{prefix}.shared_expert" if moe.shared_gate else f"{prefix}.shared_experts"
        found.insert(0, tuple(f"{shared}.{name}" for name in _PROJECTIONS[site]))
    return found


_PROJECTIONS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


@dataclass(frozen=True)
class Input:
    """What some modules read: `take` gives their rows [T, K] by step, none at all for an expert without tokens."""

    modules: tuple[str, ...]
    take: Callable[[], list[Tensor]]


class Overlay(Checkpoint):
    """A plain checkpoint in which some linears and norms are replaced by what has been made of them."""

    linears: dict[str, Weight]
    tensors: dict[str, Tensor]

    @classmethod
    def over(cls, folder: str | Path) -> Overlay:
        ckpt = cls.open(folder)
        if ckpt.quant.method != "none":
            raise ConfigError(f"{folder} is already quantised ({ckpt.quant.algo}); give the plain model", "SRC")
        ckpt.linears, ckpt.tensors = {}, {}
        ckpt._shards = UnstackedShards(Path(folder), ckpt.raw_config)
        return ckpt

    def _expert(self, prefix: str, n: int, k: int) -> Any:
        return self.linears[prefix] if prefix in self.linears else super()._expert(prefix, n, k)

    def linear(self, prefix: str, n: int, k: int) -> Any:  # a Weight; what is made may be FP8
        return self.linears[prefix] if prefix in self.linears else super().linear(prefix, n, k)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.tensors[name] if name in self.tensors else super().tensor(name, shape)

    def release(self) -> None:
        """Give back the source's mapped pages."""
        release_pages(self._shards.files)


@dataclass
class Step:
    """Some whole sequences: the residual stream between layers, and the input of the linear that comes next."""

    batch: ForwardBatch
    x: Tensor  # what the last layer put out, not yet added
    residual: Tensor | None
    h: Tensor
    routed: Routed | None = None


@dataclass(frozen=True)
class Routed:
    """A step inside a mixture. inside: what enters experts' second multiplication; shared: the shared expert's."""

    weights: Tensor
    chosen: Tensor
    inside: Inside | None = None
    shared: Tensor | None = None


class Walk:
    """The hidden states of a calibration text before the next layer."""

    def __init__(self, ckpt: Overlay, kernels: Kernels, sequences: Sequence[list[int]]) -> None:
        """Raises ConfigError without sequences, UnsupportedFormatError for a model without DecoderLayers,
        CheckpointError for tokens that the model does not have."""
        architecture = parse_architecture(ckpt.raw_config)
        known = sorted(name for name, module in ARCHITECTURES.items() if module == "llama" and name not in LATENT)
        if architecture not in known:
            raise UnsupportedFormatError(
                f"calibration runs {', '.join(known)} layer by layer, found {architecture}; quantise it without --calib"
            )
        if not sequences:
            raise ConfigError("the calibration text has no tokens", "--calib")
        self.ckpt, self.kernels = ckpt, kernels
        self.config = config = parse_model_config(ckpt.raw_config)
        if (highest := max(map(max, sequences))) >= config.vocab_size:
            raise CheckpointError(
                f"the calibration text has the token {highest}, and {ckpt.path} has {config.vocab_size} of them: its "
                "tokenizer.json belongs to another model"
            )
        self._rope = rope_tables(config.rope, config.head_dim, WINDOW)
        steps = deal(sequences)
        num_blocks = 1 + max(sum(-(-len(ids) // BLOCK_SIZE) for ids in step) for step in steps)
        self._kv_dtype: KVDtype = "float32" if kernels.dtype == "float32" else "bfloat16"
        spec = AttentionSpec(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, window=None)
        (kv,) = allocate([spec], self._kv_dtype, num_blocks, BLOCK_SIZE, torch.device("cpu"))
        assert isinstance(kv, KVLayer)
        self.kv = kv
        embedding = ckpt.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        stream = getattr(torch, kernels.stream)
        self.steps = []
        for step in steps:
            batch = prefill_batch(step, (self.kv,) * config.num_layers)
            x = torch.nn.functional.embedding(batch.input_ids, embedding).to(stream)
            self.steps.append(Step(batch, x, None, x))
        self.num_tokens = sum(len(ids) for ids in sequences)
        ckpt.release()

    def build(self, layer_id: int) -> DecoderLayer:
        """The layer with the weights the overlay holds now."""
        return DecoderLayer(self.ckpt, self.kernels, self.config, layer_id, *self._rope, self._kv_dtype)

    def states(self) -> list[tuple[Tensor, Tensor | None]]:
        """A copy of the hidden states, to come back to."""
        return [(step.x.clone(), None if step.residual is None else step.residual.clone()) for step in self.steps]

    def restore(self, states: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        for step, (x, residual) in zip(self.steps, states, strict=True):
            step.x, step.residual = x, residual


class LayerRun:
    """One layer over all steps, from input to input: `to("qkv")`, `to("o")`, `to("gate_up")`, `to("down")`, `end()`.

    `to` returns what enters that linear, [T, K] per step, and uses the weights the overlay holds at that moment.
    kv_amax  largest key (after rope, as it is cached) and value, once "o" has been reached
    """

    def __init__(self, walk: Walk, layer_id: int) -> None:
        self._walk, self._layer_id = walk, layer_id
        self.kv_amax = (0.0, 0.0)
        walk.kv.k.zero_()
        walk.kv.v.zero_()

    @torch.inference_mode()
    def to(self, site: str) -> list[Tensor]:
        layer = self._walk.build(self._layer_id)
        for step in self._walk.steps:
            if site == "qkv":
                step.h, step.residual = layer.input_norm(step.x, step.residual)
            elif site == "o":
                step.h = _attend(layer, step)
                self._watch_cache()
            elif site == "gate_up":
                step.h, step.residual = layer.post_attention_norm(layer.attention.o_proj(step.h), step.residual)
                if isinstance(layer.mlp, MoE):
                    step.routed = Routed(*layer.mlp.router(step.h))
            elif isinstance(layer.mlp, MoE):
                step.routed = _into_experts(layer.mlp, step)
            else:
                step.h = layer.mlp.silu_mul(layer.mlp.gate_up_proj(step.h))
        return [step.h for step in self._walk.steps]

    def inputs(self, site: str) -> list[Input]:
        """What each reader of `site` reads, which `to` has reached."""
        found = readers(self._walk, self._layer_id, site)
        if len(found) == 1:
            return [Input(found[0], lambda: [step.h for step in self._walk.steps])]
        moe = self._walk.config.moe
        assert moe is not None
        inputs = []
        if moe.shared_size:
            inputs.append(Input(found.pop(0), functools.partial(self._shared, site)))
        return inputs + [Input(modules, functools.partial(self._of_expert, site, e)) for e, modules in enumerate(found)]

    def _shared(self, site: str) -> list[Tensor]:
        if site == "gate_up":
            return [step.h for step in self._walk.steps]
        return [step.routed.shared for step in self._walk.steps if step.routed and step.routed.shared is not None]

    def _of_expert(self, site: str, expert: int) -> list[Tensor]:
        rows = []
        for step in self._walk.steps:
            assert step.routed is not None
            if site == "gate_up":
                rows.append(step.h[(step.routed.chosen == expert).any(dim=1)])
            else:
                assert step.routed.inside is not None
                start, stop = step.routed.inside.offsets[expert : expert + 2].tolist()
                rows.append(step.routed.inside.rows[start:stop])
        return [part for part in rows if len(part)]

    @torch.inference_mode()
    def end(self) -> None:
        """The layer's output becomes the input of the next."""
        layer = self._walk.build(self._layer_id)
        for step in self._walk.steps:
            step.x = _out_of_experts(layer.mlp, step) if isinstance(layer.mlp, MoE) else layer.mlp.down_proj(step.h)
            step.h, step.routed = step.x, None
        self._walk.ckpt.release()

    def through(self) -> None:
        """The whole layer."""
        for site in SITES:
            self.to(site)
        self.end()

    def _watch_cache(self) -> None:
        k, v = self.kv_amax
        cache = self._walk.kv
        self.kv_amax = (max(k, float(cache.k.abs().max())), max(v, float(cache.v.abs().max())))


def _into_experts(mlp: MoE, step: Step) -> Routed:
    assert step.routed is not None
    shared = None
    if mlp.shared is not None:
        assert isinstance(mlp.shared.mlp, MLP), "Walk's families have gated feed-forwards"
        shared = mlp.shared.mlp.silu_mul(mlp.shared.mlp.gate_up_proj(step.h))
    return replace(step.routed, inside=mlp.experts.into(step.h, step.routed.chosen), shared=shared)


def _out_of_experts(mlp: MoE, step: Step) -> Tensor:
    routed = step.routed
    assert routed is not None
    assert routed.inside is not None
    y = mlp.experts.out_of(routed.inside, routed.weights)
    if mlp.shared is None or routed.shared is None:
        return y
    shared = mlp.shared.mlp.down_proj(routed.shared)
    return y + (shared if mlp.shared.gate is None else (shared * mlp.shared.gate(step.h).sigmoid()).to(shared.dtype))


def _attend(layer: DecoderLayer, step: Step) -> Tensor:
    a = layer.attention
    assert isinstance(a, Attention), "Walk refuses latent attention"
    return a.heads(step.h, step.batch)


def largest_input(inputs: Sequence[Tensor], modules: Sequence[str]) -> float:
    """The largest magnitude among `inputs`. CheckpointError where one is not finite."""
    bounds = [torch.aminmax(x) for x in inputs]
    amax = max(float(torch.maximum(-low, high)) for low, high in bounds)
    if not all(bool(torch.isfinite(low) & torch.isfinite(high)) for low, high in bounds):
        raise CheckpointError(f"the input of {', '.join(modules)} holds NaN or Inf; the model is not sound")
    return amax


def windows(texts_ids: Sequence[Sequence[int]], limit: int | None = None) -> list[list[int]]:
    """Token ids cut into windows of at most 512; at most `limit` of them, evenly spaced over the text."""
    cut = [list(ids[i : i + WINDOW]) for ids in texts_ids for i in range(0, len(ids), WINDOW)]
    if limit is None or len(cut) <= limit:
        return cut
    whole = [ids for ids in cut if len(ids) == WINDOW] or cut
    limit = min(limit, len(whole))
    return [whole[i * len(whole) // limit] for i in range(limit)]


def deal(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Whole sequences dealt into steps of at most STEP_TOKENS tokens."""
    steps: list[list[list[int]]] = [[]]
    for ids in sequences:
        if steps[-1] and sum(map(len, steps[-1])) + len(ids) > STEP_TOKENS:
            steps.append([])
        steps[-1].append(ids)
    return steps


def prefill_batch(sequences: Sequence[list[int]], kv: tuple[CacheLayer, ...]) -> ForwardBatch:
    """Prompts from their start, each in blocks of its own; logits of the last token only, since none are wanted."""
    lengths = [len(ids) for ids in sequences]
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    first_blocks = [1 + sum(num_blocks[:i]) for i in range(len(sequences))]  # block 0 is the null block
    width = max(num_blocks)
    tables = [[*range(first, first + n), *[0] * (width - n)] for first, n in zip(first_blocks, num_blocks, strict=True)]
    starts = zip(first_blocks, lengths, strict=True)
    return ForwardBatch(
        input_ids=torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slot_mapping=torch.cat([torch.arange(first * BLOCK_SIZE, first * BLOCK_SIZE + n) for first, n in starts]),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        logits_rows=torch.tensor([sum(lengths) - 1]),
        kv=kv,
    )
