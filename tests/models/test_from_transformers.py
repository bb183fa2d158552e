"""Decoders run by transformers' module on our kernels and cache: the logits of transformers alone, in float32.

Tolerance 1e-4: two layers of float32 arithmetic in different summation orders on logits of order 1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.batch import StateLayer
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import CheckpointError, ConfigError, UnsupportedFormatError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import Model, load_model
from tests import tiny
from tests.models.paged import PagedRunner
from tests.models.test_dequantised_weights import dequantised

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {**MOE, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Mistral": {"head_dim": 16, "sliding_window": 9},
    "Ministral3": {"head_dim": 16},
    "Phi3": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 16},
    "SeedOss": {"head_dim": 16},
    "Glm4": {"head_dim": 16},
    "Glm4Moe": {**MOE, "n_routed_experts": 8, "head_dim": 16},
    "DeepseekV3": {**MOE, **MLA, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "MiniMaxM2": {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Granite": {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Gemma": {"head_dim": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4},
    "Starcoder2": {},
    "Cohere2": {"head_dim": 16, "sliding_window": 16},
    "Exaone4": {"head_dim": 16, "sliding_window": 16},
    "SmolLM3": {},
    "Ernie4_5": {"head_dim": 16},
    "HunYuanDenseV1": {"head_dim": 16},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3Next": {**DELTA, **MOE, "num_experts": 8, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3_5": DELTA,
    "NemotronH": {
        **MOE, "head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
        "expand": 2, "chunk_size": 16, "conv_kernel": 4, "hybrid_override_pattern": "MEM*-ME", "n_routed_experts": 8,
        "moe_shared_expert_intermediate_size": 64,
    },
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2, "mamba_chunk_size": 16, "logits_scaling": 2.0,
        "position_embedding_type": None,
    },
}  # fmt: skip
TEXT_CONFIGS = {"Qwen3_5": "Qwen3_5TextConfig", "Gemma3": "Gemma3TextConfig"}
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 1, 60)]


def make(family: str, **values: Any) -> Any:
    """A transformers model whose every parameter and stored buffer is random."""
    config_class = getattr(transformers, TEXT_CONFIGS.get(family, f"{family}Config"))
    config = config_class(**{**BASE, **values}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(std=0.1)
    return model


def load(folder: Path) -> Model:
    kernels = Kernels(available_backends("auto"), "float32", "w4a16")
    return load_model(Checkpoint.open(folder), kernels, "float32", impl="transformers")


def logits_alone(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_and_chunks_give_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    model = make(family, **FAMILIES[family])
    expected = logits_alone(model)
    runner = PagedRunner(load(tiny.save_transformers(tmp_path, model)))
    first = runner.run((0, PROMPTS[0]), (1, PROMPTS[1]), (2, PROMPTS[2][:21]))
    then = runner.run((2, PROMPTS[2][21:22]), (3, PROMPTS[0]))
    last = runner.run((2, PROMPTS[2][22:]))
    for found, want in ((first[0], expected[0]), (first[1], expected[1]), (then[1], expected[0])):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([first[2], then[0], last[0]]), expected[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_run_in_batches_chunks_and_slots_that_had_other_owners(tmp_path: Path, family: str) -> None:
    """Delta nets compute a prompt in chunks and decode token by token: 5e-4, where one form alone keeps 1e-4."""
    model = make(family, **HYBRIDS[family])
    expected = logits_alone(model)
    decoder = load(tiny.save_transformers(tmp_path, model))
    assert {type(spec).__name__ for spec in decoder.kv_specs} == {"AttentionSpec", "StateSpec"}
    runner = PagedRunner(decoder)
    for layer in runner.kv:
        if isinstance(layer, StateLayer):
            layer.conv.fill_(7.0)
            layer.ssm.fill_(7.0)
    found: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    at = dict.fromkeys(found, 0)
    # a prompt whole, one of one token, one in pieces of one and more; then two decode beside a prompt's next piece
    for step in ([(0, 30), (1, 1)], [(2, 1)], [(2, 20), (0, 1)], [(0, 1), (2, 1)], [(2, 38), (0, 5)]):
        pieces = [(seq, PROMPTS[seq][at[seq] : at[seq] + count]) for seq, count in step]
        for (seq, count), logits in zip(step, runner.run(*pieces), strict=True):
            found[seq].append(logits)
            at[seq] += count
    for seq, parts in found.items():
        torch.testing.assert_close(torch.cat(parts), expected[seq][: at[seq]], rtol=0, atol=5e-4)
    assert [at[seq] for seq in found] == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("scheduler", [{}, {"max_num_batched_tokens": 16}, {"num_blocks": 9, "max_model_len": 96}])
@pytest.mark.parametrize("family", ["Qwen3Next", "GraniteMoeHybrid"])
def test_the_engine_s_greedy_tokens_of_a_hybrid_are_transformers(
    tmp_path: Path, family: str, scheduler: dict[str, int]
) -> None:
    model = make(family, **HYBRIDS[family])
    folder = tiny.save_transformers(tmp_path, model)
    prompts, expected = [prompt[:40] for prompt in PROMPTS], []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        expected.append(ids[0, len(prompt) :].tolist())
    llm = LLM(folder, dtype="float32", model_impl="transformers", **{"num_blocks": 65, **scheduler})
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12)
    for _ in range(2):
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.parametrize("family", ["Olmo2", "Qwen3Moe", "MiniMaxM2", "DeepseekV3"])
def test_nvfp4_weights_give_the_logits_of_the_dequantised_ones(tmp_path: Path, family: str) -> None:
    """Packed under the names that the hub has, experts one by one; every expert has a scale of its own."""
    model = make(family, **FAMILIES[family])
    model.save_pretrained(tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    raw = json.loads((tmp_path / "hub" / "config.json").read_text())
    folder = tiny.write_modelopt(tmp_path / "nvfp4", raw, tensors, share_scale_2=False, shards=2)
    packed = tiny.pack_tensors(tensors, ("lm_head", "model.embed_tokens"), 0.01, None, share_scale_2=False)
    assert sum(name.endswith("weight_scale_2") for name in packed) >= 14
    tiny.write_plain(tmp_path / "plain", raw, dequantised(packed))
    expected = logits_alone(type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32))
    found = PagedRunner(load(folder)).run(*enumerate(PROMPTS))
    for logits, want in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [{}, {"max_num_batched_tokens": 16}, {"num_blocks": 9, "max_model_len": 96}])
def test_the_engine_s_greedy_tokens_are_transformers(tmp_path: Path, scheduler: dict[str, int]) -> None:
    """In one batch; in chunks; with so few blocks that requests give way to each other. Twice: prefix hits."""
    model = make("Gemma3", **FAMILIES["Gemma3"])
    folder = tiny.save_transformers(tmp_path, model)
    prompts = [prompt[:40] for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        expected.append(ids[0, len(prompt) :].tolist())
    llm = LLM(folder, dtype="float32", model_impl="transformers", **{"num_blocks": 65, **scheduler})
    assert llm.info.architecture == "Gemma3ForCausalLM"
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12)
    for _ in range(2):
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


REFUSED = {
    "Nemotron": ({}, "does not pass keyword arguments on"),
    "StableLm": ({}, "does not take attention functions from outside"),
    "Gemma2": ({"head_dim": 16}, "capped scores"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers are of type 'conv'"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_the_fallback_cannot_do_is_refused_by_name(tmp_path: Path, family: str) -> None:
    values, why = REFUSED[family]
    model = make(family, **values)
    with pytest.raises(UnsupportedFormatError, match=f"--model-impl transformers cannot run.*{why}"):
        load(tiny.save_transformers(tmp_path, model))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "no_such"}, "none that transformers knows"),
        ({"model_type": ["llama"]}, "none that transformers knows"),
        ({"architectures": ["LlamaConfig"]}, "'LlamaConfig' is no class"),
        ({"architectures": ["os"]}, "'os' is no class"),
        ({"architectures": ["LlamaModel"]}, "has no head that gives logits"),
        ({"architectures": ["BertModel"]}, "cannot build BertModel|does not take attention functions"),
        ({"hidden_act": "no_such"}, "cannot build LlamaForCausalLM: .*no_such"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    folder = tiny.tiny_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **change}))
    with pytest.raises(UnsupportedFormatError, match=why):
        load(folder)


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = tiny.tiny_llama(
        tmp_path / "model", auto_map={"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.TrapConfig"}
    )
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Trap: pass\nclass TrapConfig: pass\n")
    load(folder)
    assert not mark.exists()


def test_tensors_that_are_missing_or_misshapen_or_left_over_are_named(tmp_path: Path) -> None:
    config = tiny.llama_config(architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    names = ("post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    tensors = {n: t for n, t in tiny.random_tensors(config).items() if "input_layernorm" not in n}
    sizes = {names[0]: 64, names[1]: 64, names[2]: 32}
    tensors |= {f"model.layers.{i}.{n}.weight": torch.ones(sizes[n]) for i in range(2) for n in names}
    load(tiny.write_plain(tmp_path / "whole", config, tensors))
    lost = "model.layers.1.self_attn.q_norm.weight"
    for change, error in (
        ({n: t for n, t in tensors.items() if n != lost}, lost),
        ({**tensors, lost: torch.ones(63)}, lost),
        ({**tensors, "model.layers.1.extra.weight": torch.ones(4)}, "model.layers.1.extra.weight"),
    ):
        folder = tiny.write_plain(tmp_path / str(len(change)) / error, config, change)
        with pytest.raises(CheckpointError, match=re.escape(error)):
            load(folder)


def test_our_own_implementation_is_taken_where_there_is_one(tmp_path: Path) -> None:
    folder = tiny.tiny_llama(tmp_path)
    kernels = Kernels(available_backends("auto"), "float32")
    assert type(load_model(Checkpoint.open(folder), kernels)).__module__.endswith("models.llama")
    assert type(load(folder)).__module__.endswith("from_transformers.model")


def test_asking_for_ours_where_there_is_none_says_what_there_is(tmp_path: Path) -> None:
    folder = tiny.save_transformers(tmp_path, make("Olmo2"))
    with pytest.raises(UnsupportedFormatError, match=r"'Olmo2ForCausalLM', which has no implementation here.*Llama"):
        load_model(Checkpoint.open(folder), Kernels(available_backends("auto"), "float32"), impl="native")


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_transformers(tmp_path, make("Olmo2"))
    with pytest.raises(ConfigError, match="--lm-head-dtype fp8"):
        load_model(Checkpoint.open(folder), Kernels(available_backends("auto"), "float32"), lm_head_dtype="fp8")
