"""Loading: the class by architecture, the head, the cache's type, and tensors nobody reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.cache.specs import AttentionSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype
from nvfp4_runtime.errors import (
    MissingTensorError,
    NoBackendError,
    TensorShapeError,
    UnexpectedTensorError,
    UnsupportedFormatError,
)
from nvfp4_runtime.kernels.ops import LinearKernel
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import ARCHITECTURES, load_model
from nvfp4_runtime.models.hf_config import FAMILIES
from nvfp4_runtime.models.llama import Decoder
from nvfp4_runtime.nvfp4 import codec
from tests.models.paged import PagedRunner
from tests.tiny import llama_config, qwen3_config, random_tensors, tiny_llama, tiny_nvfp4_llama, write_plain

TOKENS = list(range(1, 20))


def load(path: Path, dtype: Dtype = "float32") -> Decoder:
    return load_model(Checkpoint.open(path), Kernels([ReferenceBackend()], dtype))


def logits(path: Path) -> Tensor:
    return PagedRunner(load(path)).run((0, TOKENS))[0]


def test_every_architecture_with_a_class_has_a_config_family() -> None:
    assert set(ARCHITECTURES) == {*FAMILIES, "NemotronHForCausalLM"}


def test_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    tiny_llama(tmp_path, architectures=["BertModel"])
    with pytest.raises(UnsupportedFormatError, match=r"'BertModel'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        load_model(Checkpoint.open(tmp_path), Kernels([ReferenceBackend()], "float32"), impl="native")


def test_cache_type_follows_the_checkpoint_unless_told(tmp_path: Path) -> None:
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    tiny_llama(plain)
    tiny_nvfp4_llama(scaled, kv_scales=(0.02, 0.03))
    assert load(plain, "bfloat16").kv_dtype == "bfloat16"
    assert load(plain).kv_dtype == "float32"
    model = load(scaled)
    assert model.kv_dtype == "fp8"
    config = llama_config()
    k_scale, v_scale = float(torch.tensor(0.02)), float(torch.tensor(0.03))  # stored in float32
    spec = AttentionSpec(config["num_key_value_heads"], config["head_dim"], None, k_scale, v_scale, True)
    assert model.kv_specs == (spec,) * len(model.layers)
    kept = load_model(Checkpoint.open(scaled), Kernels([ReferenceBackend()], "bfloat16"), "bfloat16")
    assert kept.kv_dtype == "bfloat16"


def test_fp8_cache_changes_logits_a_little(tmp_path: Path) -> None:
    """E4M3 keeps 4 significant bits: a relative step of 1/16, averaged over keys and values of a two-layer model."""
    tiny_nvfp4_llama(tmp_path, kv_scales=(0.02, 0.02))
    exact = PagedRunner(load_model(Checkpoint.open(tmp_path), Kernels([ReferenceBackend()], "float32"), "float32"))
    want = exact.run((0, TOKENS))[0]
    error = float((logits(tmp_path) - want).abs().mean())
    assert 0 < error < 0.1 * float(want.std())


def test_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path)
    kernel = model.lm_head.kernels[0]
    assert kernel.operand.data_ptr() == model.embedding.data_ptr()  # type: ignore[attr-defined]  # reference kernel


def test_tied_head_saved_twice_is_accepted_and_a_different_one_is_not(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    once, twice, other = (tmp_path / name for name in ("once", "twice", "other"))
    write_plain(once, config, tensors)
    embedding = tensors["model.embed_tokens.weight"]
    write_plain(twice, config, tensors | {"lm_head.weight": embedding.clone()})
    assert torch.equal(logits(once), logits(twice))
    write_plain(other, config, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(UnsupportedFormatError, match="tie_word_embeddings"):
        load(other)


@pytest.mark.parametrize("tied", [False, True])
def test_head_may_be_nvfp4(tmp_path: Path, tied: bool) -> None:
    """Also where the config still says tied: the tool quantised a copy of the embedding."""
    config = llama_config(tie_word_embeddings=tied, vocab_size=272)
    tensors = random_tensors(config)
    head = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
    scale_2 = codec.weight_scale_2(head.abs().max())
    packed, scale = codec.quantize(head, scale_2)
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": scale_2}
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.*"]}
    names = {f"lm_head.{name}": tensor for name, tensor in stored.items()}
    write_plain(quantised, {**config, "quantization_config": section}, tensors | names)
    dequantised = {"lm_head.weight": codec.dequantize(packed, scale, scale_2)}
    write_plain(plain, {**config, "tie_word_embeddings": False}, tensors | dequantised)
    torch.testing.assert_close(logits(quantised), logits(plain), rtol=0, atol=1e-4)


def test_harmless_tensors_pass_and_others_are_named(tmp_path: Path) -> None:
    config = llama_config()
    old, odd = tmp_path / "old", tmp_path / "odd"
    tensors = random_tensors(config)
    write_plain(old, config, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(old)
    write_plain(odd, config, tensors | {"model.layers.9.mlp.gate_proj.weight": torch.ones(2, 2)})
    with pytest.raises(UnexpectedTensorError, match=r"layers\.9\.mlp\.gate_proj"):
        load(odd)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = qwen3_config()
    tensors = random_tensors(config)
    missing = {k: v for k, v in tensors.items() if k != "model.layers.1.self_attn.k_norm.weight"}
    write_plain(tmp_path / "missing", config, missing)
    with pytest.raises(MissingTensorError, match=r"layers\.1\.self_attn\.k_norm\.weight"):
        load(tmp_path / "missing")
    write_plain(tmp_path / "shape", config, tensors | {"model.norm.weight": torch.ones(3)})
    with pytest.raises(TensorShapeError, match=r"model\.norm\.weight"):
        load(tmp_path / "shape")


def test_float16_is_refused_with_the_backend_s_reason(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    with pytest.raises(NoBackendError, match="float16"):
        load(tmp_path, "float16")


def test_rope_tables_stop_at_the_longest_sequence_asked_for(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = load_model(Checkpoint.open(tmp_path), Kernels([ReferenceBackend()], "float32"), max_positions=24)
    assert model.max_positions == 24
    assert model.layers[0].attention.cos.shape[0] == 24
    assert torch.equal(PagedRunner(model).run((0, TOKENS))[0], logits(tmp_path))


def test_every_linear_is_observed_under_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_nvfp4_llama(tmp_path)
    seen: list[str] = []

    def observe(names: tuple[str, ...], kernel: LinearKernel) -> LinearKernel:
        seen.extend(names)
        return kernel

    kernels = Kernels([ReferenceBackend()], "float32", observe=observe)
    ckpt = Checkpoint.open(tmp_path)
    load_model(ckpt, kernels)
    suffix = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".gate_proj", ".up_proj", ".down_proj")
    stored = {name.removesuffix(".weight") for name in ckpt.names() if name.endswith(".weight")}
    assert sorted(seen) == sorted({name for name in stored if name.endswith(suffix)} | {"lm_head"})
    groups = [choice.group for choice in kernels.choices if choice.stored != "-"]
    assert groups[:4] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert groups[-1] == "lm_head"
