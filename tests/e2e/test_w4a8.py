"""W4A8 stays near W4A16 on the default model: the KL over real text, printed and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.evaluate.evaluate import evaluate
from nvfp4_runtime.evaluate.scorer import Side
from nvfp4_runtime.evaluate.windows import cut, read_text
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.conftest import DefaultModel

pytestmark = [pytest.mark.model]

WINDOW, NUM_WINDOWS = 512, 8


def test_mean_kl_of_w4a8_to_w4a16_is_at_most_three_thousandths(default_model: DefaultModel, shared: Path) -> None:
    tokenizer = Tokenizer.load(default_model.nvfp4)
    windows = cut(tokenizer, read_text(shared / "data" / "wikitext2-test.txt"), WINDOW, NUM_WINDOWS)
    exact, rounded = (Side(default_model.nvfp4, numerics) for numerics in ("w4a16", "w4a8"))
    (measured,) = evaluate([rounded], windows, tokenizer, exact).students
    found = measured.divergence
    assert found is not None
    p99 = found.kl_percentiles["p99"]
    print(f"\nW4A8: KL to W4A16 {found.kl.mean:.5f} nats, p99 {p99:.4f}, {windows.num_scored} positions")
    assert 0 < found.kl.mean <= 0.003
