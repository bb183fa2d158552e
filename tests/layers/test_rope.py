"""Rope tables against transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvfp4_runtime.layers.rope import inverse_frequencies, rope_tables
from nvfp4_runtime.models.hf_config import parse_rope

transformers = pytest.importorskip("transformers")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn deepseek": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
    "yarn not truncated": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn attention factor": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 2.0,
        "attention_factor": 1.7,
        "original_max_position_embeddings": 32768,
    },
}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("head_dim", [32, 128])
def test_tables_equal_transformers(name: str, head_dim: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(VARIANTS[name]),
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = parse_rope({"rope_parameters": VARIANTS[name]}, 131072)
    frequencies, factor = inverse_frequencies(rope, head_dim)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=3e-7, atol=0)  # two FP32 roundings
    positions = torch.tensor([0, 1, 2, 100, 1023])
    cos, sin = rope_tables(rope, head_dim, 1024)
    want_cos, want_sin = theirs(torch.zeros(1), positions.unsqueeze(0))
    half = head_dim // 2
    # an angle of 1023 with a frequency off by two roundings (1.2e-7) is off by 1.2e-4
    torch.testing.assert_close(cos[positions], want_cos[0, :, :half], rtol=0, atol=2e-4)
    torch.testing.assert_close(sin[positions], want_sin[0, :, :half], rtol=0, atol=2e-4)
    torch.testing.assert_close(cos[:3], theirs(torch.zeros(1), positions[None, :3])[0][0, :, :half], rtol=0, atol=1e-6)


def test_tables_are_float32_of_half_the_rotary_dim() -> None:
    cos, sin = rope_tables(parse_rope({"rope_theta": 1e4}, 64), 16, 40)
    assert cos.shape == sin.shape == (40, 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[0], torch.ones(8))
    assert float(sin[1, 0]) == pytest.approx(0.8414709848, rel=1e-6)
