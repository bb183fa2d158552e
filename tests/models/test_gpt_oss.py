"""gpt-oss as it is published, experts in MXFP4, and what is refused of its config.json and files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.hf_config import parse_model_config
from nvfp4_runtime.nvfp4 import mx
from tests import tiny
from tests.models.paged import BACKENDS, PagedRunner, load_or_skip
from tests.tiny_families import gpt_oss_config

PROMPT = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(1)).tolist()


def published(tensors: tiny.Tensors) -> tuple[tiny.Tensors, tiny.Tensors]:
    """Experts as the hub's files hold them, `_blocks` [E, N, K/32, 16] and `_scales`, and what these stand for."""
    stored, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(tiny.STACKS)]:
        parts: list[tuple[Tensor, Tensor]] = [mx.quantize(expert.t().contiguous()) for expert in stored.pop(name)]
        codes, scales = (torch.stack(part) for part in zip(*parts, strict=True))
        stored |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)).contiguous(), f"{name}_scales": scales}
        experts = [mx.MXFP4Weight(*part).dequantize().t() for part in parts]
        plain[name] = torch.stack(experts).contiguous()
    return stored, plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_layout_gives_the_logits_of_its_dequantised_experts(tmp_path: Path, backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = gpt_oss_config()
    stored, plain = published(tiny.random_tensors(config, seed=2))
    section = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    folder = tiny.write_plain(tmp_path / "mxfp4", {**config, "quantization_config": section}, stored, shards=2)
    tiny.write_plain(tmp_path / "plain", config, plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    decoder = load_or_skip(folder, backend)
    if backend == "cpu":
        assert decoder.layers[0].mlp.experts.first[0].weight_bytes < 8 * 2 * 96 * 64  # under a byte each: still packed
    found = torch.cat([PagedRunner(decoder).run((0, PROMPT))[0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": False}, "attention_bias is False"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0; expected more than 0"),
        ({"swiglu_limit": "7"}, "swiglu_limit is '7'"),
        ({"sliding_window": None}, "sliding_window is None; expected a number of tokens"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is 'chunked_attention'"),
    ],
)
def test_what_cannot_be_is_refused_by_field_and_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=re.escape(named)):
        parse_model_config({**gpt_oss_config(), **change})


def test_windows_alternate_where_the_config_says_nothing() -> None:
    config = parse_model_config({**gpt_oss_config(num_hidden_layers=4), "sliding_window": 128})
    assert config.layer_windows == (128, None, 128, None)


def test_experts_without_their_biases_are_refused(tmp_path: Path) -> None:
    config = gpt_oss_config()
    tensors = {name: t for name, t in tiny.random_tensors(config).items() if not name.endswith("down_proj_bias")}
    folder = tiny.write_plain(tmp_path, config, tensors)
    with pytest.raises(UnsupportedFormatError, match="no bias although this architecture's experts have one each"):
        load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"))
