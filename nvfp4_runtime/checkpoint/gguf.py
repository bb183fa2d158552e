"""A Llama GGUF file to a plain Hugging Face folder: weights in BF16, configuration and tokenizer from its metadata.

GGUF stores q_proj and k_proj with each head's rotary pairs interleaved (x0, y0, x1, y1, ...); Hugging Face keeps the
halves apart (x0, x1, ..., y0, y1, ...). Tensors are dequantised to FP32, put in that order, and rounded to BF16 once.
NVFP4 tensors keep their second scale in a tensor of their own, `blk.0.attn_q.scale`: it multiplies before the rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.writer import ShardWriter, TensorSpec, write_json
from nvfp4_runtime.errors import CheckpointError, InvalidScaleError, UnsupportedFormatError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SCALE, _INPUT_SCALE = ".scale", ".input_scale"  # the latter is for 4-bit activations, of which BF16 knows nothing
_CONTROL, _USER_DEFINED = 3, 4  # gguf token types


def convert_gguf(source: Path, out: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write the model in `source` into the existing folder `out` as a BF16 Hugging Face checkpoint.

    `progress(name, done, total)` is called after each tensor, in bytes of output.
    Raises CheckpointError when the file is unreadable, UnsupportedFormatError when it is no Llama with a byte-level
    BPE of a kind we know.
    """
    import gguf  # slow to import, and only conversion needs it

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"cannot read {source} as GGUF: {error}") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedFormatError(f"{source} holds a {architecture!r} model; only 'llama' GGUF files are converted")
    scales = {t.name: _scale(t, source) for t in reader.tensors if t.name.endswith(_SCALE)}
    tensors = [t for t in reader.tensors if not t.name.endswith((_SCALE, _INPUT_SCALE))]
    config = _config(meta, tied=all(t.name != "output.weight" for t in tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    plan = [(t, _hf_name(t.name, source), tuple(int(n) for n in reversed(t.shape))) for t in tensors]
    if homeless := set(scales) - {t.name.removesuffix(".weight") + _SCALE for t in tensors}:
        raise CheckpointError(f"{source} holds the scale {min(homeless)!r} and no tensor it belongs to")
    specs = [TensorSpec(name, "BF16", shape) for _, name, shape in plan]
    total, done = sum(spec.nbytes for spec in specs), 0
    with ShardWriter(out, specs) as writer:
        for (tensor, name, shape), spec in zip(plan, specs, strict=True):
            values = _dequantised(tensor, source) * scales.get(tensor.name.removesuffix(".weight") + _SCALE, 1.0)
            kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if kind in heads:
                values = _halves_apart(values, heads[kind])
            writer.write(name, values.reshape(shape).to(torch.bfloat16))
            done += spec.nbytes
            if progress is not None:
                progress(name, done, total)
    write_json(out / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(out / "generation_config.json", special)
    _write_tokenizer(meta, config, source, out)


def _dequantised(tensor: Any, source: Path) -> Tensor:
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError as error:
        raise UnsupportedFormatError(
            f"{source} stores {tensor.name!r} as {tensor.tensor_type.name}, which the installed gguf package cannot "
            f"dequantise ({error}): install a newer one"
        ) from error


def _scale(tensor: Any, source: Path) -> float:
    """The second scale of an NVFP4 tensor."""
    values = _dequantised(tensor, source).reshape(-1)
    if values.numel() != 1 or not bool(torch.isfinite(values).all()) or float(values) < 0:
        raise InvalidScaleError(tensor.name, source.name, f"{values[:4].tolist()} ({values.numel()} values)")
    return float(values)


def _hf_name(name: str, source: Path) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _IN_BLOCK:
        raise UnsupportedFormatError(f"{source} holds the tensor {name!r}, which a plain Llama does not have")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.weight"


def _halves_apart(w: Tensor, num_heads: int) -> Tensor:
    """Rows of q_proj or k_proj from interleaved rotary pairs to Hugging Face's two halves per head."""
    return w.reshape(num_heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    def get(key: str) -> Any:
        if key not in meta:
            raise CheckpointError(f"the GGUF metadata has no {key!r}, which a Llama needs")
        return meta[key]

    hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": get("llama.feed_forward_length"),
        "max_position_embeddings": get("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": get("llama.block_count"),
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _shortest(get("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(meta.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": len(get("tokenizer.ggml.tokens")),
    }
    if any(key.startswith("llama.rope.scaling") for key in meta):
        raise UnsupportedFormatError("GGUF files with rope scaling are not converted")
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{theirs}_token_id" in meta:
            config[f"{ours}_token_id"] = int(meta[f"tokenizer.ggml.{theirs}_token_id"])
    return config


def _shortest(value: float) -> float:
    """The decimal a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _write_tokenizer(meta: dict[str, Any], config: dict[str, Any], source: Path, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json of a byte-level BPE that splits digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UnsupportedFormatError(f"{source} has a tokenizer of kind {kind}; only ('gpt2', 'smollm') is converted")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (m.split(" ") for m in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [(i, token) for i, token in enumerate(tokens) if types[i] in (_CONTROL, _USER_DEFINED)]
    for i, token in added:
        tokenizer.add_tokens([AddedToken(token, special=types[i] == _CONTROL, normalized=False)])
    tokenizer.save(str(out / "tokenizer.json"))

    ids = {
        "bos_token": config.get("bos_token_id"),
        "eos_token": config.get("eos_token_id"),
        "pad_token": config.get("pad_token_id"),
        "unk_token": meta.get("tokenizer.ggml.unknown_token_id"),
    }
    names = {role: tokens[i] for role, i in ids.items() if i is not None}
    decoder = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": types[i] == _CONTROL,
        }
        for i, token in added
    }
    tokenizer_config = {
        "add_prefix_space": False,
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": decoder,
    }
    if template := meta.get("tokenizer.chat_template"):
        tokenizer_config["chat_template"] = template
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "special_tokens_map.json", names)
