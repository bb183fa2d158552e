"""The self-test before an engine is ready: sound kernels pass in every form, a broken one is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.config import CacheConfig, EngineConfig
from nvfp4_runtime.engine import sanity
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels import self_test as tested
from nvfp4_runtime.kernels.ops import DeltaSpec, LinearSpec, Mamba2Spec, NormSpec, PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4 import fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight, fuse
from tests import tiny
from tests.tiny import tiny_llama, tiny_nvfp4_llama, tiny_qwen2, tiny_qwen3


def nvfp4(n: int, k: int, seed: int) -> NVFP4Weight:
    g = torch.Generator().manual_seed(seed)
    return NVFP4Weight(
        packed=torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        block_scale=torch.randint(0x30, 0x40, (n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn),
        weight_scale_2=torch.full((1,), 1e-3 * (seed + 1)),
        group_rows=(n,),
        input_scale=1 / 2688,
    )


def plain(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * k**-0.5


def block_fp8(n: int, k: int) -> FP8Weight:
    scale = torch.rand(-(-n // 128), -(-k // 128), generator=torch.Generator().manual_seed(1)) + 0.1
    return FP8Weight(plain(n, k).to(torch.float8_e4m3fn), scale, (128, 128))


WEIGHTS: dict[str, Callable[[], Weight]] = {
    "nvfp4": lambda: nvfp4(200, 64, 0),
    "nvfp4 fused": lambda: fuse([nvfp4(96, 64, 1), nvfp4(16, 64, 2), nvfp4(16, 64, 3)]),
    "nvfp4 with bias": lambda: dataclasses.replace(nvfp4(40, 64, 4), bias=torch.linspace(-1, 1, 40)),
    "fp8 rows": lambda: FP8Weight(*fp8.quantize_rows(plain(100, 64)), (1, 64)),
    "fp8 blocks": lambda: block_fp8(300, 256),
    "fp8 tensor": lambda: FP8Weight(plain(80, 64).to(torch.float8_e4m3fn), torch.ones(1, 1), (80, 64)),
    "mxfp4": lambda: MXFP4Weight(nvfp4(80, 64, 5).packed, torch.full((80, 2), 121, dtype=torch.uint8)),
    "bf16": lambda: DenseWeight(plain(500, 64).to(torch.bfloat16), torch.ones(500, dtype=torch.bfloat16)),
}


def kernels(numerics: Any = "w4a16", name: str = "auto", dtype: Any = "bfloat16") -> Kernels:
    return Kernels(available_backends(name), dtype, numerics, samples={})


@pytest.mark.parametrize("numerics", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_linears_of_every_form_agree(name: str, numerics: str) -> None:
    made = kernels(numerics)
    made.linear("layer", WEIGHTS[name]())
    tested.self_test(made)
    assert made.samples is None, "weights are let go"


@pytest.mark.parametrize("numerics", ["w4a16", "w4a4"])
def test_grouped_linears_agree_and_a_wrong_one_is_named(numerics: str) -> None:
    made = kernels(numerics)
    made.grouped_linear("experts", [nvfp4(80, 64, seed) for seed in range(5)])
    assert made.samples is not None
    ((spec, (weights, _, name)),) = made.samples.items()
    exchanged = made.backends[0].grouped_linear([*weights[1:], weights[0]], spec)  # type: ignore[arg-type]
    tested.self_test(made)
    made.samples = {spec: (weights, exchanged, "fast")}
    if name != "reference":
        with pytest.raises(KernelError, match="fast computes GroupedLinearSpec"):
            tested.self_test(made)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "fp8", "nvfp4"])
def test_ops_without_weights_agree(kv_dtype: Any, dtype: Any) -> None:
    made = kernels(dtype=dtype)
    made.rms_norm(64)
    made.silu_mul(96)
    for qk_norm in (False, True):
        made.rope_and_cache(RopeSpec(4, 2, 32, 32, qk_norm, kv_dtype, made.stream))
    for window in (None, 7):
        made.paged_attention(PagedAttentionSpec(4, 2, 32, window, kv_dtype, made.stream, dtype))
    made.relu_squared(96)
    made.mamba2(Mamba2Spec(4, 16, 16, 2, 4, made.stream, dtype))
    made.gated_delta(DeltaSpec(2, 4, 16, 16, 4, made.stream))
    count = tested.self_test(made)
    native = sum(backend.name != "reference" for backend in made.chosen.values())
    assert count == native


class Wrong:
    """A kernel that is right but for what `spoil` does to its result."""

    def __init__(self, kernel: Any, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.kernel, self.spoil, self.weight_bytes = kernel, spoil, kernel.weight_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.kernel(x))


@pytest.mark.parametrize(
    "spoil",
    [lambda y: y * 1.2, lambda y: y.roll(1, 1), lambda y: y.roll(1, 0), lambda y: y * torch.nan],
    ids=["scale", "columns", "rows", "NaN"],
)
def test_a_linear_that_is_wrong_is_named(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made = kernels()
    made.linear("layer", nvfp4(200, 64, 0))
    assert made.samples is not None
    ((spec, (weights, kernel, _)),) = made.samples.items()
    made.samples[spec] = (weights, Wrong(kernel, spoil), "fast")
    with pytest.raises(KernelError, match=r"self-test: fast computes LinearSpec\(n=200, k=64.* --no-self-test"):
        tested.self_test(made)


def test_an_op_that_is_wrong_is_named() -> None:
    made = kernels()
    (reference,) = available_backends("reference")

    class WrongNorm:
        name = "fast"

        def rms_norm(self, spec: NormSpec) -> Any:
            def run(*arguments: Any) -> Any:
                normed, total = reference.rms_norm(spec)(*arguments)
                return normed * 1.1, total

            return run

    made.chosen[NormSpec(64, "float32", "bfloat16")] = WrongNorm()  # type: ignore[assignment]
    with pytest.raises(KernelError, match="fast computes NormSpec"):
        tested.self_test(made)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_nvfp4_llama, tiny_qwen2, tiny_qwen3])
def test_untrained_models_make_sense(make: Callable[..., Path], backend: str, tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(make(tmp_path / "m")), backend=backend, self_test=True, cache=CacheConfig(num_blocks=9)
    )
    engine = build_engine(config)
    assert engine.info.startup_seconds["self_test"] > 0
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("write", [tiny.write_plain, tiny.write_modelopt])
@pytest.mark.parametrize(
    "make", [tiny.mixtral_config, tiny.qwen3_moe_config, tiny.glm4_moe_config, tiny.deepseek_v3_config]
)
def test_mixtures_and_latent_attention_make_sense(make: Callable[[], Any], write: Any, tmp_path: Path) -> None:
    raw = make()
    folder = write(tmp_path / "m", raw, tiny.random_tensors(raw))
    build_engine(EngineConfig(model=str(folder), self_test=True, cache=CacheConfig(num_blocks=9)))


def test_a_transformers_model_makes_sense(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = str(tiny_qwen3(tmp_path / "m"))
    build_engine(EngineConfig(model=folder, model_impl="transformers", self_test=True, cache=CacheConfig(num_blocks=9)))


class Nonsense(ModelRunner):
    """A runner whose logits are made up from what it is asked."""

    def __init__(self, made_up: Callable[[int, int], torch.Tensor]) -> None:
        self.made_up = made_up

    def logits(self, schedule: Any, rows: Any) -> torch.Tensor:
        (entry,) = schedule.entries
        return torch.stack([self.made_up(i, entry.count) for i in range(entry.start, entry.stop)])


@pytest.mark.parametrize(
    ("made_up", "said"),
    [
        (lambda i, _: torch.full((50,), torch.nan), "finite"),
        (lambda i, _: torch.ones(50), "as likely as any other"),
        (lambda i, count: torch.arange(50.0).roll(i + 3 * count), "decoding token 4"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(made_up: Any, said: str, tmp_path: Path) -> None:
    info = build_engine(EngineConfig(model=str(tiny_llama(tmp_path / "m")), cache=CacheConfig(num_blocks=9))).info
    with pytest.raises(KernelError, match=said):
        sanity.check_sanity(Nonsense(made_up), info)
    sanity.check_sanity(Nonsense(lambda i, _: torch.arange(50.0).roll(i)), info)


def test_the_specs_compared_are_those_in_use() -> None:
    made = kernels()
    for seed in range(3):
        made.linear("layer", nvfp4(32, 64, seed))
    made.linear("other", nvfp4(48, 64, 9))
    assert made.samples is not None
    assert [spec.n for spec in made.samples] == [32, 48]
    assert all(isinstance(spec, LinearSpec) for spec in made.samples)
