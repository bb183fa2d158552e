"""Mixtures and latent attention as one native call, against the same ops called one by one; relu squared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, LatentLayer
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import MoEConfig
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.whole import NativeMixture
from nvfp4_runtime.kernels.ops import ActivationSpec, GroupedLinearSpec, LinearSpec, ReluSquaredSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import MixtureOps
from nvfp4_runtime.layers.mla import LatentAttention
from nvfp4_runtime.layers.moe import Experts, route
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight
from tests import tiny
from tests.kernels.conftest import cpu_backend, random_nvfp4, random_tensor, same_bits
from tests.models.paged import PagedRunner

HIDDEN, INNER, EXPERTS = 80, 48, 8
PLAIN = MoEConfig(num_experts=EXPERTS, top_k=3, intermediate_size=INNER, layers=(True,), renormalise=False)
SIGMOID = replace(PLAIN, scoring="sigmoid", correction_bias=True, scale=2.5, renormalise=True)
CONFIGS = {
    "softmax": replace(PLAIN, renormalise=True),
    "groups": replace(SIGMOID, num_groups=4, top_groups=2),
    "plain experts": replace(SIGMOID, gated=False),
    "all experts": replace(PLAIN, top_k=EXPERTS),
}


def experts(kind: str, n: int, k: int) -> list[Weight]:
    if kind == "bf16":
        return [DenseWeight(random_tensor(n, k, seed=e)) for e in range(EXPERTS)]
    return [random_nvfp4(n, k, seed=e, input_scale=0.01 * (1 + e)) for e in range(EXPERTS)]


def make(
    config: MoEConfig, kind: str, dtype: Any, stream: Any, isa: str | None = None
) -> tuple[NativeMixture, Experts]:
    """The mixture as one call, and its experts with the same kernels, called one by one."""
    backend = cpu_backend(isa, 2)
    numerics: Any = kind if kind.startswith("w4") else None
    width = 2 * INNER if config.gated else INNER
    first, down = experts(kind, width, HIDDEN), experts(kind, HIDDEN, INNER)
    spec = GroupedLinearSpec(EXPERTS, width, HIDDEN, first[0].format, numerics, dtype, stream)
    plain = Experts.__new__(Experts)
    plain.first = [backend.grouped_linear(first, spec)]
    plain.down = backend.grouped_linear(down, replace(spec, n=HIDDEN, k=INNER))
    if config.gated:
        plain.activation = backend.silu_mul(ActivationSpec(INNER, stream, dtype))
    else:
        plain.activation = backend.relu_squared(ReluSquaredSpec(INNER, stream, dtype))
    plain.dtype, plain.bounds, plain.has_all = getattr(torch, dtype), torch.arange(EXPERTS + 1), True
    plain.stream, plain.width = getattr(torch, stream), HIDDEN
    router = backend.linear(
        DenseWeight(random_tensor(EXPERTS, HIDDEN, seed=50)),
        LinearSpec(EXPERTS, HIDDEN, "bf16", None, dtype, "float32"),
    )
    correction = random_tensor(EXPERTS, seed=51, dtype=torch.float32) if config.correction_bias else None
    ops = MixtureOps(router, correction, config, plain.first, plain.activation, plain.down)
    made = backend.mixture(ops)
    assert isinstance(made, NativeMixture), made
    return made, plain


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("kind", "dtype", "stream"),
    [("w4a16", "bfloat16", "float32"), ("w4a4", "bfloat16", "bfloat16"), ("bf16", "float32", "float32")],
)
def test_a_mixture_is_what_its_ops_give_one_by_one(isa: str, name: str, kind: str, dtype: Any, stream: Any) -> None:
    """Equal but for the scores, whose exponentials differ by some units in the last place of float32."""
    config = CONFIGS[name]
    whole, one_by_one = make(config, kind, dtype, stream, isa)
    for rows in (1, 5, 40):
        x = random_tensor(rows, HIDDEN, seed=rows, dtype=getattr(torch, dtype))
        shared = random_tensor(rows, HIDDEN, seed=60, dtype=getattr(torch, stream))
        gate = random_tensor(rows, 1, seed=61, dtype=torch.float32)
        weights, chosen = route(whole._ops.router(x), config, whole._ops.correction)
        routed = one_by_one(x, weights, chosen)
        close: dict[str, float] = {"rtol": 2e-6, "atol": 2e-6 * float(routed.abs().max())}
        if stream == "bfloat16":  # a score's last bit may move the rounding of a result, or of a sum with `shared`
            close = {"rtol": 2.0**-7, "atol": 2.0**-7 * float(routed.abs().max())}
        torch.testing.assert_close(whole(x, x, None, None), routed, **close)
        assert whole.chosen == chosen.flatten().tolist()
        torch.testing.assert_close(whole(x, x, shared, None), routed + shared, **close)
        expected = routed + (shared * gate.sigmoid()).to(shared.dtype)
        torch.testing.assert_close(whole(x, x, shared, gate), expected, **close)


def test_a_token_has_one_result_in_any_company_and_on_any_number_of_threads(isa: str) -> None:
    whole, _ = make(CONFIGS["groups"], "w4a16", "bfloat16", "float32", isa)
    x = random_tensor(33, HIDDEN, seed=3)
    together = whole(x, x, None, None)
    for rows in ([0], [32], [3, 3, 3], list(range(32, -1, -1))):
        some = x[rows].contiguous()
        assert same_bits(whole(some, some, None, None), together[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_still_choose_experts_that_exist(value: float) -> None:
    for config in CONFIGS.values():
        whole, _ = make(config, "bf16", "float32", "float32")
        x = torch.full((2, HIDDEN), value)
        whole(x, x, None, None)
        for token in (whole.chosen[: config.top_k], whole.chosen[config.top_k :]):
            assert len(set(token)) == config.top_k
            assert set(token) <= set(range(EXPERTS))


def test_a_mixture_refuses_tensors_of_other_shapes() -> None:
    whole, _ = make(CONFIGS["softmax"], "w4a16", "bfloat16", "float32")
    x = random_tensor(3, HIDDEN, seed=1)
    shared, gate = torch.zeros(3, HIDDEN), torch.zeros(3, 1)
    for bad, words in (
        ((x[:, :-1], x, None, None), "x: expected"),
        ((x, x[:2].contiguous(), None, None), "inner_x: expected"),
        ((x, x, shared[:2], None), "shared: expected"),
        ((x, x, shared, gate[:2]), "gate: expected"),
    ):
        with pytest.raises(KernelError, match=words):
            whole(*bad)
    assert whole(x[:0], x[:0], None, None).shape == (0, HIDDEN)


def test_relu_squared_agrees_with_the_reference_to_the_bit(isa: str) -> None:
    for stream, dtype in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        x = random_tensor(7, 77, seed=2, dtype=getattr(torch, stream))
        x[3, 5] = float("nan")
        spec = ReluSquaredSpec(77, stream, dtype)  # type: ignore[arg-type]
        found, expected = (backend.relu_squared(spec)(x) for backend in (cpu_backend(isa), ReferenceBackend()))
        assert same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))


LATENT = {
    "interleaved": tiny.deepseek_v3_config(),
    "halves": tiny.deepseek_v3_config(rope_interleave=False),
    "queries at once": tiny.deepseek_v3_config(q_lora_rank=None),
}


def attention_of(tmp_path: Any, config: dict[str, Any], stream: Any) -> tuple[LatentAttention, PagedRunner]:
    tiny.write_modelopt(
        tmp_path, config, tiny.random_tensors(config), exclude=("lm_head", "model.embed_tokens", "*o_proj")
    )
    kernels = Kernels([cpu_backend(threads=2)], "bfloat16", "w4a16", stream)
    model = load_model(Checkpoint.open(str(tmp_path)), kernels, "bfloat16")
    layer = model.layers[0].attention
    assert isinstance(layer, LatentAttention)
    assert layer.run_as_one is not None
    return layer, PagedRunner(model)


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_latent_attention_as_one_call_gives_the_bits_of_its_ops_one_by_one(
    tmp_path: Any, name: str, stream: Any
) -> None:
    layer, runner = attention_of(tmp_path, LATENT[name], stream)
    whole = layer.run_as_one
    for pieces in ([(0, 20), (1, 1)], [(0, 1), (1, 3)], [(1, 1), (0, 1)]):
        batch = runner.batch([(seq, list(range(5, 5 + count))) for seq, count in pieces])
        x = random_tensor(sum(count for _, count in pieces), 64, seed=7)
        found = []
        for layer.run_as_one in (whole, None):
            cache = batch.kv[0].latent
            found.append((layer(x, batch), cache.clone()))
            cache[batch.slot_mapping // cache.shape[1], batch.slot_mapping % cache.shape[1]] = 3.0
        cache.copy_(found[0][1])
        assert same_bits(found[0][0], found[1][0])
        assert same_bits(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("slot_mapping", 1 << 40, r"slot_mapping\[0\] is 1099511627776"),
        ("positions", -1, r"positions\[0\] is -1"),
        ("positions", 1 << 40, r"positions\[0\] is 1099511627776"),
        ("block_tables", 1 << 20, r"block_tables\[0, 0\] is 1048576"),
    ],
)
def test_a_latent_layer_refuses_what_points_outside(tmp_path: Any, field: str, value: int, words: str) -> None:
    layer, runner = attention_of(tmp_path, LATENT["halves"], "float32")
    batch: ForwardBatch = runner.batch([(0, [5])])
    wrong: Tensor = torch.full_like(getattr(batch, field), value)
    with pytest.raises(IndexError, match=words):
        layer(random_tensor(1, 64, seed=7), replace(batch, **{field: wrong}))
    short = LatentLayer(batch.kv[0].latent[..., :-1].contiguous())
    with pytest.raises(KernelError, match="cache: expected"):
        layer(random_tensor(1, 64, seed=7), replace(batch, kv=(short,)))
