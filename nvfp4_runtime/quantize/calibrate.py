"""Calibration: the largest magnitude each linear layer's input takes over a text, and each layer's keys and values.

The model runs through our own layers and kernels; `Kernels.observe` shows us every linear's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.cache.paged_kv import allocate
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.kernels.ops import LinearKernel
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.codec import E4M3_MAX, SCALE_2_DENOMINATOR

WINDOW = 512  # tokens per sequence: long enough for attention to spread
STEP_TOKENS = 1024  # tokens per forward pass, whole sequences together: few passes, little memory
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Calibration:
    """Scales measured over `num_tokens` tokens.

    input_scales  module -> amax / 2688 of its input
    kv_scales     attention module -> (k_scale, v_scale), amax / 448, keys after rope as they are cached
    """

    input_scales: dict[str, float]
    kv_scales: dict[str, tuple[float, float]]
    num_tokens: int


class Recorder:
    """Wraps linear kernels (as `Kernels.observe`) and keeps the largest |x| seen per module."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}

    def __call__(self, names: tuple[str, ...], kernel: LinearKernel) -> LinearKernel:
        return _RecordingKernel(names, kernel, self.amax)


class _RecordingKernel:
    def __init__(self, names: tuple[str, ...], kernel: LinearKernel, amax: dict[str, float]) -> None:
        self.weight_bytes = kernel.weight_bytes
        self._names = names
        self._kernel = kernel
        self._amax = amax

    def __call__(self, x: Tensor) -> Tensor:
        low, high = (float(value) for value in torch.aminmax(x))
        largest = max(-low, high)  # both are NaN if anything is
        if not math.isfinite(largest):
            raise CheckpointError(f"the input of {', '.join(self._names)} holds NaN or Inf; the model is not sound")
        for name in self._names:
            self._amax[name] = max(largest, self._amax.get(name, 0.0))
        return self._kernel(x)


def calibrate(folder: str | Path, texts: Sequence[str], *, backend: str = "auto", progress: bool = True) -> Calibration:
    """Run `texts` through the plain model in `folder` (BF16 activations) and measure.

    Each text is tokenised as it is, special tokens in it recognised, and cut into windows of 512 tokens.
    Raises ConfigError when the texts hold no token, CheckpointError when an activation is not finite.
    """
    sequences = [ids[i : i + WINDOW] for ids in tokenize(Path(folder), texts) for i in range(0, len(ids), WINDOW)]
    if not sequences:
        raise ConfigError("the calibration text has no tokens", "--calib")
    recorder = Recorder()
    kernels = Kernels(available_backends(backend), "bfloat16", observe=recorder)
    model = load_model(Checkpoint.open(folder), kernels, kv_dtype="bfloat16", max_positions=WINDOW)
    steps = _steps(sequences)
    num_blocks = 1 + max(sum(-(-len(ids) // BLOCK_SIZE) for ids in step) for step in steps)
    kv = allocate(model.kv_specs, "bfloat16", num_blocks, BLOCK_SIZE, torch.device("cpu"))
    kv_amax = [(0.0, 0.0)] * len(kv)
    for step in tqdm(steps, desc="calibrate", unit="step", disable=not progress):
        with torch.inference_mode():
            model.forward(_batch(step, kv))
        kv_amax = [
            (max(k, float(layer.k.abs().max())), max(v, float(layer.v.abs().max())))
            for (k, v), layer in zip(kv_amax, kv, strict=True)
        ]
    return Calibration(
        input_scales={name: value / SCALE_2_DENOMINATOR for name, value in recorder.amax.items()},
        kv_scales={
            f"model.layers.{i}.self_attn": (k / E4M3_MAX or 1.0, v / E4M3_MAX or 1.0)
            for i, (k, v) in enumerate(kv_amax)
        },
        num_tokens=sum(len(ids) for ids in sequences),
    )


def tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, which calibration needs")
    tokenizer = Tokenizer.from_file(str(path))
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts if text]


def _steps(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Whole sequences dealt into steps of at most STEP_TOKENS tokens."""
    steps: list[list[list[int]]] = [[]]
    for ids in sequences:
        if steps[-1] and sum(map(len, steps[-1])) + len(ids) > STEP_TOKENS:
            steps.append([])
        steps[-1].append(ids)
    return steps


def _batch(sequences: Sequence[list[int]], kv: tuple[KVLayer, ...]) -> ForwardBatch:
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
