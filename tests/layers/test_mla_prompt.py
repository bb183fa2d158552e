"""Latent attention of long parts of prompts, expanded, against the absorbed form: whole, cut, and beside decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.layers.mla_prompt import FEWEST
from nvfp4_runtime.models import load_model
from tests import tiny
from tests.models.paged import PagedRunner

TOKENS = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(3)).tolist()
CONFIGS = {
    "values narrower than keys": tiny.deepseek_v3_config(),
    "values wider than keys": tiny.deepseek_v3_config(v_head_dim=48),
    "queries at once": tiny.deepseek_v3_config(q_lora_rank=None),
}
STEPS: list[list[tuple[int, int]]] = [
    [(0, 100), (1, 3)],  # a long prompt beside a short one
    [(1, 1), (0, 70), (2, FEWEST - 1)],  # its next part, over cached latent vectors, between the others'
    [(0, 1), (1, FEWEST), (2, 1)],
]


def logits(folder: Path, kernels: Kernels, expanded: bool) -> list[torch.Tensor]:
    model = load_model(Checkpoint.open(str(folder)), kernels, kernels.dtype)  # type: ignore[arg-type]  # of KV as well
    for layer in model.layers:
        assert layer.attention.expanded is not None
        if not expanded:
            layer.attention.expanded = None
    runner, at, found = PagedRunner(model), 0, []
    for step in STEPS:
        pieces = []
        for seq, count in step:
            pieces.append((seq, TOKENS[at : at + count]))
            at += count
        found.append(model.forward(runner.batch(pieces)))
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_expanded_prompts_give_the_logits_of_absorbed_ones(tmp_path: Path, name: str, backend: str) -> None:
    """float32: sums of some hundred products in another order, through two layers."""
    config = CONFIGS[name]
    tiny.write_plain(tmp_path, config, tiny.random_tensors(config))
    wanted = logits(tmp_path, Kernels([ReferenceBackend()], "float32"), expanded=False)
    found = logits(tmp_path, Kernels(available_backends(backend, 2), "float32"), expanded=True)
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_they_differ_by_roundings_of_keys_and_values(tmp_path: Path) -> None:
    """Of most tokens: where a rounding sends one to another expert, its logits are others."""
    config = CONFIGS["values narrower than keys"]
    tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config))
    kernels: list[Any] = [Kernels(available_backends("auto", 2), "bfloat16", "w4a16") for _ in range(2)]
    expanded, absorbed = (logits(tmp_path, k, way) for k, way in zip(kernels, (True, False), strict=True))
    assert "kv_b_proj.prompts" in {choice.group for choice in kernels[0].choices}
    for a, b in zip(expanded, absorbed, strict=True):
        error = float(((a - b).norm(dim=1) / b.norm(dim=1)).median())
        assert error < 0.02, error
    assert float((expanded[0] - absorbed[0]).abs().max()) > 0  # the long one did go the other way


def test_weights_that_prompts_read_again_are_counted_once(tmp_path: Path) -> None:
    config = CONFIGS["queries at once"]
    tiny.write_plain(tmp_path, config, tiny.random_tensors(config))
    kernels = Kernels(available_backends("auto", 1), "float32")
    load_model(Checkpoint.open(str(tmp_path)), kernels, "float32")
    (again,) = {(c.stored, c.num_bytes) for c in kernels.choices if c.group == "kv_b_proj.prompts"}
    assert again == ("-", 0)
