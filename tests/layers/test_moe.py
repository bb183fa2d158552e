"""Routing against a loop that does what the papers say, and experts' results whatever company a token has."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import MoEConfig
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.layers.moe import MoE, route
from nvfp4_runtime.models.hf_config import parse_model_config
from tests import tiny

PLAIN = MoEConfig(num_experts=8, top_k=3, intermediate_size=32, layers=(True,), renormalise=False)
CONFIGS = {
    "softmax": PLAIN,
    "renormalised": replace(PLAIN, renormalise=True),
    "sigmoid": replace(PLAIN, scoring="sigmoid", correction_bias=True, scale=2.5, renormalise=True),
    "groups": replace(PLAIN, scoring="sigmoid", correction_bias=True, num_groups=4, top_groups=2),
    "all experts": replace(PLAIN, top_k=8),
    "one group of two": replace(PLAIN, scoring="sigmoid", num_groups=2, top_groups=1, top_k=4),
}


def slowly(logits: list[float], config: MoEConfig, correction: list[float]) -> list[tuple[int, float]]:
    """(expert, weight) of one token, best first, in Python's floats."""
    exps = [math.exp(x - max(logits)) for x in logits]
    scores = [e / sum(exps) for e in exps] if config.scoring == "softmax" else [1 / (1 + math.exp(-x)) for x in logits]
    ranked = [score + bias for score, bias in zip(scores, correction, strict=True)]
    size = config.num_experts // config.num_groups
    groups = [ranked[i * size : (i + 1) * size] for i in range(config.num_groups)]
    merits = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(config.num_groups), key=lambda g: -merits[g])[: config.top_groups]
    experts = [e for e in range(config.num_experts) if e // size in best]
    chosen = sorted(experts, key=lambda e: -ranked[e])[: config.top_k]
    total = sum(scores[e] for e in chosen) if config.renormalise else 1.0
    return [(e, scores[e] / total * config.scale) for e in chosen]


@pytest.mark.parametrize("name", CONFIGS)
def test_routing_is_what_a_loop_over_tokens_finds(name: str) -> None:
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator) * 2
    correction = torch.randn(8, generator=generator) * 0.3 if config.correction_bias else torch.zeros(8)
    weights, chosen = route(logits, config, correction if config.correction_bias else None)
    for row, (ids, found) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        expected = slowly(logits[row].tolist(), config, correction.tolist())
        assert ids == [expert for expert, _ in expected]
        assert found == pytest.approx([weight for _, weight in expected], rel=1e-5)


def test_scores_that_are_all_zero_give_no_nan() -> None:
    logits = torch.full((1, 8), -1000.0)
    weights, _ = route(logits, replace(PLAIN, scoring="sigmoid", renormalise=True))
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoE:
    raw = tiny.glm4_moe_config()
    folder = tiny.write_modelopt(tmp_path_factory.mktemp("moe"), raw, tiny.random_tensors(raw))
    kernels = Kernels(available_backends(request.param), "bfloat16")
    if not all(backend.row_invariant for backend in kernels.backends[:1]) or kernels.backends[0].name != request.param:
        pytest.skip(f"{request.param} is not here or not row invariant")
    config = parse_model_config(raw)
    assert config.moe is not None
    return MoE(Checkpoint.open(folder), kernels, config.hidden_size, config.moe, "model.layers.1.mlp")


def test_a_token_has_one_result_in_any_company(mixture: MoE) -> None:
    x = torch.randn(61, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    together = mixture(x)
    assert together.shape == (61, 64)
    assert float(together.abs().mean()) > 0.01
    for rows in ([0], [60], [3, 3, 3], list(range(0, 61, 7)), list(range(60, -1, -1))):
        assert torch.equal(mixture(x[rows].contiguous()), together[rows])


def test_no_tokens_give_no_results(mixture: MoE) -> None:
    assert mixture(torch.zeros(0, 64, dtype=torch.bfloat16)).shape == (0, 64)


def test_experts_without_tokens_do_not_matter(mixture: MoE) -> None:
    """All tokens alike: every expert but top_k + shared stays idle."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    many: Tensor = mixture(x.expand(40, 64).contiguous())
    assert torch.equal(many, mixture(x).expand(40, 64))
