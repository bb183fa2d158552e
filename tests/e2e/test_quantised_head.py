"""What a quantised head costs on the default model: KL of its next-token distributions to those of the BF16 head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import HeadDtype
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.conftest import DefaultModel
from tests.models.paged import PagedRunner

pytestmark = [pytest.mark.model]

WINDOW, NUM_WINDOWS, PIECE = 1024, 4, 256

# forward KL in nats, mean over positions
BOUNDS: dict[HeadDtype, float] = {"fp8": 0.0007, "nvfp4": 0.02}


def runner(folder: Path, head: HeadDtype) -> PagedRunner:
    model = load_model(
        Checkpoint.open(folder), Kernels(available_backends(), "bfloat16", "w4a16"), "bfloat16", WINDOW, head
    )
    return PagedRunner(model, num_blocks=NUM_WINDOWS * WINDOW // 16 + 1)


@pytest.mark.parametrize("head", list(BOUNDS))
@torch.inference_mode()
def test_kl_of_a_quantised_head_to_the_bf16_head_is_bounded(
    default_model: DefaultModel, shared: Path, head: HeadDtype
) -> None:
    text = (shared / "data" / "wikitext2-test.txt").read_text()
    ids = Tokenizer.load(default_model.nvfp4).encode(text, add_special_tokens=False)
    plain, quantised = runner(default_model.nvfp4, "auto"), runner(default_model.nvfp4, head)
    total, count, same = 0.0, 0, 0
    for window in range(NUM_WINDOWS):
        for start in range(window * WINDOW, (window + 1) * WINDOW, PIECE):
            tokens = ids[start : start + PIECE]
            p, q = (r.run((window, tokens))[0].log_softmax(-1) for r in (plain, quantised))
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(tokens)
    print(f"\n{head} head: KL {total / count:.5f} nats, same best token {same / count:.4f} of {count} positions")
    assert 0 < total / count < BOUNDS[head]
