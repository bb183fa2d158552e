"""MLA decoding: the reference against a loop in FP64, and the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import MLASpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton import mla
from nvfp4_runtime.kernels.triton.paged_attention import GPUFacts
from tests.kernels.conftest import random_tensor

LENGTHS = [1, 4, 31, 32, 33, 70]


def inputs(spec: MLASpec, lengths: list[int], block_size: int = 4) -> tuple[Tensor, ...]:
    """q_nope, q_rope, cache, block_tables, seq_lens; NaN in every slot that nobody may see."""
    dtype = getattr(torch, spec.dtype)
    widths = [-(-n // block_size) for n in lengths]
    order = (torch.randperm(sum(widths), generator=torch.Generator().manual_seed(1)) + 1).tolist()
    cache = torch.full((len(order) + 1, block_size, spec.kv_lora_rank + spec.rope_dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    for b, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        tables[b, :width] = torch.tensor([order.pop() for _ in range(width)], dtype=torch.int32)
        for p in range(length):
            row = random_tensor(spec.kv_lora_rank + spec.rope_dim, seed=100 * b + p, dtype=dtype)
            cache[tables[b, p // block_size], p % block_size] = row
    q_nope = random_tensor(len(lengths), spec.num_heads, spec.kv_lora_rank, seed=2, dtype=dtype)
    q_rope = random_tensor(len(lengths), spec.num_heads, spec.rope_dim, seed=3, dtype=dtype)
    return q_nope, q_rope, cache, tables, torch.tensor(lengths, dtype=torch.int32)


def exact(spec: MLASpec, inputs: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
    """The result in FP64, and the same sums of magnitudes."""
    q_nope, q_rope, cache, tables, lens = inputs
    found, magnitudes = [], []
    for b, length in enumerate(lens.tolist()):
        at = torch.arange(length)
        rows = cache[tables[b].long()[at // cache.shape[1]], at % cache.shape[1]].double()
        latent, key = rows[:, : spec.kv_lora_rank], rows[:, spec.kv_lora_rank :]
        weights = ((q_nope[b].double() @ latent.T + q_rope[b].double() @ key.T) * scale).softmax(-1)
        found.append(weights @ latent)
        magnitudes.append(weights @ latent.abs())
    return torch.stack(found), torch.stack(magnitudes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_reference_is_attention_over_latent_vectors(dtype):
    spec = MLASpec(3, 24, 8, dtype, "float32")
    given = inputs(spec, LENGTHS)
    expected, magnitudes = exact(spec, given, 0.2)
    found = ReferenceBackend().mla_decode(spec)(*given, 0.2)
    assert ((found - expected).abs() <= 1e-5 * magnitudes + 1e-6).all()


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(3, 48, 8), (17, 64, 16)])
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_triton_agrees(triton_backend, monkeypatch, processors, heads, rank, rope, dtype, out):
    """One run of keys or many, heads that do not fill a program, widths that are no power of two."""
    monkeypatch.setattr(mla, "gpu_facts", lambda device: GPUFacts(processors))
    spec = MLASpec(heads, rank, rope, dtype, out)
    given = inputs(spec, LENGTHS)
    expected, magnitudes = exact(spec, given, 0.2)
    moved = [t.to(triton_backend.device) for t in given]
    found = triton_backend.mla_decode(spec)(*moved, 0.2).cpu().double()
    # weights and the result are rounded to bfloat16, by 2^-8 of themselves at most; float32 sums add 1e-5
    allowed = magnitudes * ((2 * 2.0**-8 if dtype == "bfloat16" else 0.0) + 1e-5) + 1e-6
    assert ((found - expected).abs() <= allowed).all()


def test_a_cache_of_another_type_is_refused(triton_backend):
    spec = MLASpec(2, 32, 16, "bfloat16", "bfloat16")
    q_nope, q_rope, cache, tables, lens = inputs(spec, [3])
    with pytest.raises(KernelError, match=r"cache is torch\.float32"):
        triton_backend.mla_decode(spec)(q_nope, q_rope, cache.float(), tables, lens, 1.0)
