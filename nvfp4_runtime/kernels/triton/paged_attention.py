"""Causal grouped-query attention over paged keys and values: one launch for decoding, prompts and both together.

A long sequence is cut into runs of keys, which as many programs take, where the batch alone would not fill the GPU. How
many depends on shapes (sequences, new tokens, width of the block tables), never on what the tensors hold: the launch can
be captured in a CUDA graph, and a row's bits depend on its own keys and on those shapes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.triton.attention_kernels import combine_kernel, paged_attention_kernel
from nvfp4_runtime.kernels.triton.common import emulated
from nvfp4_runtime.kernels.triton.kv_format import KV_CODES, NVFP4_UNIT, cache_arguments
from nvfp4_runtime.kernels.triton.numbers import has_e4m3

LOG2_E = math.log2(math.e)
MOST_SPLITS = 64
_DECODE_WAVES = 4  # programs a multiprocessor should see
_PREFILL_WAVES = 2  # fewer: partial sums cost memory where rows are many
