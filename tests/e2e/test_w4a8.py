"""W4A8 stays near W4A16 on the default model: the KL over real text, printed and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.conftest import DefaultModel
from tests.models.paged import PagedRunner

pytestmark = [pytest.mark.model]

WINDOW, NUM_WINDOWS = 512, 8


def runner(folder: Path, numerics: Numerics) -> PagedRunner:
    model = load_model(Checkpoint.open(folder), Kernels(available_backends(), "bfloat16", numerics), "bfloat16", WINDOW)
    return PagedRunner(model, num_blocks=NUM_WINDOWS * WINDOW // 16 + 1)


@torch.inference_mode()
def test_mean_kl_of_w4a8_to_w4a16_is_at_most_three_thousandths(default_model: DefaultModel, shared: Path) -> None:
    text = (shared / "data" / "wikitext2-test.txt").read_text()
    ids = Tokenizer.load(default_model.nvfp4).encode(text, add_special_tokens=False)
    exact, rounded = runner(default_model.nvfp4, "w4a16"), runner(default_model.nvfp4, "w4a8")
    found = []
    for window in range(NUM_WINDOWS):
        tokens = ids[window * WINDOW : (window + 1) * WINDOW]
        p, q = (r.run((window, tokens))[0].log_softmax(-1) for r in (exact, rounded))
        found.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    kl = torch.cat(found)
    print(f"\nW4A8: KL to W4A16 {kl.mean():.5f} nats, p99 {kl.quantile(0.99):.4f}, {len(kl)} positions")
    assert 0 < kl.mean() <= 0.003
