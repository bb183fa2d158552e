"""The Blackwell backend on a GPU with FP4 tensor cores, at a model's sizes."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.kernels.blackwell.backend import BlackwellBackend
from nvfp4_runtime.kernels.blackwell.few_tokens import MAX_TOKENS
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from tests.kernels.conftest import random_nvfp4, random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.blackwell]


def test_every_path_passes_the_probe(blackwell_place):
    backend = BlackwellBackend(blackwell_place.device)
    assert backend.missing is None
    assert backend.few_tokens_missing is None


@pytest.mark.parametrize("m", [1, 16, MAX_TOKENS, MAX_TOKENS + 1, 300, 2048])
@pytest.mark.parametrize(("n", "k", "groups"), [(6144, 4096, (4096, 1024, 1024)), (4096, 14336, None)])
def test_layers_match_the_reference(blackwell_place, m, n, k, groups):
    weight = random_nvfp4(n, k, seed=n, groups=groups, input_scale=0.0017)
    x = random_tensor(m, k, seed=m).to(blackwell_place.device)
    spec = LinearSpec(n, k, "nvfp4", "w4a4", "bfloat16", "bfloat16")
    y = BlackwellBackend(blackwell_place.device).linear(weight, spec)(x).float()
    expected = ReferenceBackend(device=blackwell_place.device).linear(weight, spec)(x).float()
    # the same products; sums in another order, and adders whose width is not published
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=2.0**-9 * float(expected.std()))
