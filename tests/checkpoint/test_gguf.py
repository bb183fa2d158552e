"""GGUF to a Hugging Face folder: names, row order, dtype, configuration and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.gguf import convert_gguf
from nvfp4_runtime.errors import CheckpointError, InvalidScaleError, UnsupportedFormatError
from nvfp4_runtime.nvfp4 import codec
from tests import tiny

CONFIG = tiny.llama_config(tie_word_embeddings=True)
TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF keeps them: of each head, x0, y0, x1, y1, ... where Hugging Face has x0, x1, ..., y0, y1, ..."""
    out = np.empty_like(w)
    dim = w.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = w[head * dim + i]
            out[head * dim + 2 * i + 1] = w[head * dim + dim // 2 + i]
    return out


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{TO_GGUF[rest.removesuffix('.weight')]}.weight"


def write_gguf(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    arch: str = "llama",
    pre: str = "smollm",
    extra: bool = False,
    raw: dict[str, np.ndarray] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*special, *letters, "he", "hel"])
    writer.add_token_types([3, 3, 3, *[1] * (len(letters) + 2)])
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        for leaf, heads in (("q_proj", 4), ("k_proj", 2)):
            if leaf in name:
                values = interleave(values, heads)
        writer.add_tensor(gguf_name(name), values)
    if extra:
        writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, dtype=np.float32))
    for name, data in (raw or {}).items():
        dtype = gguf.GGMLQuantizationType.NVFP4 if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return tiny.random_tensors(CONFIG)


def test_a_converted_model_is_the_original_in_bf16_under_its_own_names(tmp_path, tensors):
    out = tmp_path / "out"
    out.mkdir()
    seen: list[tuple[str, int, int]] = []
    convert_gguf(write_gguf(tmp_path / "m.gguf", tensors), out, lambda *step: seen.append(step))
    found = load_file(out / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert seen[-1][1] == seen[-1][2] == sum(t.nbytes for t in found.values())
    config = Checkpoint.open(out).raw_config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert config[key] == CONFIG[key]
    assert (config["rope_theta"], config["head_dim"], config["tie_word_embeddings"]) == (10000.0, 16, True)


def test_the_tokenizer_merges_splits_digits_and_knows_its_special_tokens(tmp_path, tensors):
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(write_gguf(tmp_path / "m.gguf", tensors), out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("hello 42<|im_end|>").tokens == ["hel", "l", "o", "Ġ", "4", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("hello wörld 42").ids) == "hello wörld 42"
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma"}, "holds a 'gemma' model"),
        ({"pre": "llama-bpe"}, r"\('gpt2', 'llama-bpe'\)"),
        ({"extra": True}, "'blk.0.attn_q_norm.weight'"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_by_name(tmp_path, tensors, options, message):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsupportedFormatError, match=message):
        convert_gguf(write_gguf(tmp_path / "m.gguf", tensors, **options), out)


def nvfp4_blocks(packed: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """ggml's layout: super-blocks of 64, 4 scale bytes and 32 bytes of codes, elements i and i + 8 sharing a byte."""
    codes = codec.unpack_codes(packed).reshape(packed.shape[0], -1, 4, 2, 8)
    nibbles = (codes[..., 0, :] | (codes[..., 1, :] << 4)).flatten(2)
    scales = scale.view(torch.uint8).reshape(packed.shape[0], -1, 4)
    return torch.cat([scales, nibbles], dim=2).flatten(1).numpy()


@pytest.mark.parametrize("scale", [2.0**-8, None])
def test_nvfp4_tensors_are_dequantised_with_their_second_scale(tmp_path, tensors, scale):
    """The package reads ggml's nibble order and halved scales; the tensor scale beside it is ours to apply."""
    module = "model.layers.1.self_attn.o_proj"
    packed, block_scale = codec.quantize(tensors[f"{module}.weight"], torch.tensor(2.0**-8))
    raw = {"blk.1.attn_output.weight": nvfp4_blocks(packed, block_scale)}
    if scale is not None:
        raw |= {"blk.1.attn_output.scale": np.float32([scale]), "blk.1.attn_output.input_scale": np.float32([0.5])}
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(write_gguf(tmp_path / "m.gguf", without(tensors, f"{module}.weight"), raw=raw), out)
    found = load_file(out / "model.safetensors")
    assert set(found) == set(tensors)
    want = codec.dequantize(packed, block_scale, torch.tensor(scale or 1.0))
    assert torch.equal(found[f"{module}.weight"], want.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"blk.1.attn_output.scale": np.float32([np.nan])}, InvalidScaleError, r"attn_output\.scale.*nan"),
        ({"blk.1.attn_output.scale": np.float32([1, 2])}, InvalidScaleError, "2 values"),
        ({"blk.7.attn_output.scale": np.float32([1])}, CheckpointError, "no tensor it belongs to"),
    ],
)
def test_an_odd_scale_is_refused_by_name(tmp_path, tensors, raw, error, message):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(error, match=message):
        convert_gguf(write_gguf(tmp_path / "m.gguf", tensors, raw=raw), out)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model at all, but long enough to look like one")
    with pytest.raises(CheckpointError, match=r"cannot read .* as GGUF"):
        convert_gguf(path, tmp_path)
