"""W4A8 stays near W4A16 on the default model: the mean KL over real text, printed and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.conftest import DefaultModel
from tests.models.paged import PagedRunner

pytestmark = [pytest.mark.model]

WINDOW, NUM_WINDOWS = 512, 8


@torch.inference_mode()
def log_probabilities(folder: Path, numerics: Numerics, windows: list[list[int]]) -> list[Tensor]:
    """fp32 [WINDOW, V] per window, as the native kernels give them."""
    kernels = Kernels(available_backends("auto"), "bfloat16", numerics)
    model = load_model(Checkpoint.open(str(folder)), kernels, "bfloat16", 2 * WINDOW)
    batches = (PagedRunner(model).batch([(0, window)]) for window in windows)
    return [torch.log_softmax(_forward(model, batch), dim=-1) for batch in batches]
