"""The LM head, quantised at load: the bits of the definition, the report that says so, the embedding left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import CacheConfig, EngineConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.errors import ConfigError, NoBackendError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.llama import Decoder
from nvfp4_runtime.nvfp4 import codec, fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from tests.models.paged import PagedRunner
from tests.tiny import llama_config, random_tensors, write_modelopt, write_plain

TOKENS = list(range(3, 30))


def load(
    path: Path, backend: str = "reference", head: Any = "auto", numerics: Any = "w4a16"
) -> tuple[Decoder, Kernels]:
    kernels = Kernels(available_backends(backend), "float32", numerics)
    try:
        return load_model(Checkpoint.open(path), kernels, "float32", lm_head_dtype=head), kernels
    except NoBackendError as error:
        if backend == "reference":
            raise
        pytest.skip(str(error))


def logits(model: Decoder) -> Tensor:
    return PagedRunner(model).run((0, TOKENS))[0]


def head_tensor(tensors: dict[str, Tensor]) -> Tensor:
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def rounded(head: Tensor, form: str) -> Tensor:
    if form == "fp8":
        codes, scale = fp8.quantize_rows(head)
        return FP8Weight(codes, scale, (1, head.shape[1])).dequantize()
    scale_2 = codec.weight_scale_2(head.abs().max())
    return codec.dequantize(*codec.quantize(head, scale_2), scale_2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_head_gives_the_logits_of_the_rounded_weight(
    tmp_path: Path, backend: str, form: str, tied: bool
) -> None:
    """Float32 activations: only the order of sums differs between the two checkpoints."""
    config = llama_config(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    write_plain(tmp_path / "plain", config, tensors)
    explicit = {**config, "tie_word_embeddings": False}
    write_plain(tmp_path / "rounded", explicit, tensors | {"lm_head.weight": rounded(head_tensor(tensors), form)})
    model, kernels = load(tmp_path / "plain", backend, form)
    found, wanted = logits(model), logits(load(tmp_path / "rounded", backend)[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not torch.equal(found, logits(load(tmp_path / "plain", backend)[0]))
    (choice,) = [c for c in kernels.choices if c.group == "lm_head"]
    assert choice.stored == form
    assert choice.numerics == {"fp8": "w8a16", "nvfp4": "w4a16"}[form]
    assert choice.reason == "quantised at load from fp32"
    assert torch.equal(model.embedding, tensors["model.embed_tokens.weight"])


def test_auto_keeps_what_the_checkpoint_stores(tmp_path: Path) -> None:
    config = llama_config()
    write_plain(tmp_path, config, random_tensors(config))
    _, kernels = load(tmp_path)
    (choice,) = [c for c in kernels.choices if c.group == "lm_head"]
    assert (choice.stored, choice.numerics, choice.reason) == ("fp32", "dense", "")


def test_a_head_quantised_at_load_stays_w4a16_where_w4a4_was_asked_for(tmp_path: Path) -> None:
    config = llama_config()
    write_modelopt(tmp_path, config, random_tensors(config))
    _, kernels = load(tmp_path, head="nvfp4", numerics="w4a4")
    by_group = {c.group: c for c in kernels.choices}
    assert by_group["qkv_proj"].numerics == "w4a4"
    assert by_group["lm_head"].numerics == "w4a16"
    assert "needs a calibrated input_scale" in by_group["lm_head"].reason


def test_a_head_stored_quantised_is_kept_and_nothing_else_is_made_of_it(tmp_path: Path) -> None:
    config = llama_config(vocab_size=272)
    tensors = random_tensors(config)
    scale_2 = codec.weight_scale_2(tensors["lm_head.weight"].abs().max())
    packed, scale = codec.quantize(tensors.pop("lm_head.weight"), scale_2)
    head = {"lm_head.weight": packed, "lm_head.weight_scale": scale, "lm_head.weight_scale_2": scale_2}
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.*"]}
    write_plain(tmp_path, {**config, "quantization_config": section}, tensors | head)
    for asked in ("auto", "nvfp4"):
        _, kernels = load(tmp_path, head=asked)
        (choice,) = [c for c in kernels.choices if c.group == "lm_head"]
        assert (choice.stored, choice.reason) == ("nvfp4", "")
    for asked in ("fp8", "bf16"):
        with pytest.raises(ConfigError, match=f"--lm-head-dtype {asked} was asked for, and .* its head as nvfp4"):
            load(tmp_path, head=asked)


def test_a_head_that_cannot_be_quantised_is_a_configuration_error(tmp_path: Path) -> None:
    config = llama_config()
    tensors = random_tensors(config)
    tensors["lm_head.weight"][5, 3] = torch.nan
    write_plain(tmp_path, config, tensors)
    with pytest.raises(ConfigError, match="--lm-head-dtype fp8: cannot quantise weights that hold NaN or Inf"):
        load(tmp_path, head="fp8")


def test_the_engine_reports_the_head_it_made(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True)
    write_plain(tmp_path, config, random_tensors(config))
    engine = build_engine(EngineConfig(model=str(tmp_path), lm_head_dtype="fp8", cache=CacheConfig(num_blocks=9)))
    (group,) = [g for g in engine.info.layers if g.name == "lm_head"]
    assert group.stored == "fp8"
    assert group.reason.startswith("quantised at load from ")
    assert 8 < group.bits_per_weight < 9
