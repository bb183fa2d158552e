"""Logits equal transformers' (eager attention, float32) for every family, variant and way of slicing the work.

Tolerance 1e-4: two layers of float32 arithmetic in different summation orders on logits of order 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from tests.models.paged import BACKENDS, PagedRunner, load_or_skip
from tests.tiny import save_transformers

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
QWEN_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
GLM_MOE = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
NEMOTRON = {
    "num_hidden_layers": None,
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
NEMOTRON_MOE = {
    **NEMOTRON,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 2.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 12.0, 16.0],
    "original_max_position_embeddings": 128,
    "factor": 4.0,
    "partial_rotary_factor": 0.75,
}
MINISTRAL3_ROPE = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
GEMMA3 = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "sliding_window": 16,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA4 = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
GPT_OSS = {"head_dim": 16, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim 32": ("Llama", {"head_dim": 32}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama yarn mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama yarn not truncated": (
        "Llama",
        {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 sliding with biases": (
        "Qwen3",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 9}),
    "mistral without window": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "mixtral": ("Mixtral", {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3 moe": ("Qwen3Moe", {**QWEN_MOE, "norm_topk_prob": True}),
    "qwen3 moe, scores as they are": ("Qwen3Moe", {**QWEN_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen2 moe": (
        "Qwen2Moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 48, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "glm4 moe": ("Glm4Moe", {**GLM_MOE, "attention_bias": True, "use_qk_norm": True, "n_shared_experts": 2}),
    "deepseek v3": ("DeepseekV3", {**DEEPSEEK, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek v3, one query projection": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None, "rope_interleave": False}),
    "glm4 moe lite": ("Glm4MoeLite", {**DEEPSEEK, "qk_nope_head_dim": 24, "n_group": 1, "topk_group": 1}),
    "nemotron h": ("NemotronH", {**NEMOTRON, "hybrid_override_pattern": "M-M*-M-"}),
    "nemotron h moe": ("NemotronH", {**NEMOTRON_MOE, "hybrid_override_pattern": "MEM*EME"}),
    "nemotron h latent moe": ("NemotronH", {**NEMOTRON_MOE, "hybrid_override_pattern": "ME*E", "moe_latent_size": 32}),
    "ministral": (
        "Ministral",
        {"head_dim": 16, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE}),
    "phi3": (
        "Phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 128, "original_max_position_embeddings": 128},
    ),
    "phi3 with a window": ("Phi3", {"sliding_window": 9}),
    "gemma3": ("Gemma3", GEMMA3),
    "qwen3 next": ("Qwen3Next", {**DELTA, **QWEN_MOE, "shared_expert_intermediate_size": 32, "norm_topk_prob": True}),
    "qwen3.5": ("Qwen3_5", {**DELTA, "linear_num_key_heads": 4, "attention_bias": True}),
    "minimax m2": ("MiniMaxM2", {**GPT_OSS, "rotary_dim": 8}),
    "gemma4": ("Gemma4", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4 moe": ("Gemma4", {**GEMMA4, **GEMMA4_EXPERTS, "tie_word_embeddings": False}),
    "gpt oss": (
        "GptOss",
        {**GPT_OSS, "sliding_window": 16, "num_hidden_layers": 3, "rope_parameters": {**YARN, "truncate": False}},
    ),
    "glm4 moe in groups": ("Glm4Moe", {**GLM_MOE, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
}
TEXT_CONFIGS = ("Gemma3", "Gemma4", "Qwen3_5")
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 1, 90, 16, 5)]


def make(family: str, values: dict[str, Any]) -> Any:
    """A transformers model whose every parameter is random: default norms of one and biases of zero hide bugs."""
    name = f"{family}TextConfig" if family in TEXT_CONFIGS else f"{family}Config"
    config = getattr(transformers, name)(**{**BASE, **values}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=list(CASES), ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A saved checkpoint and transformers' logits for each prompt alone."""
    family, values = CASES[request.param]
    model = make(family, dict(values))
    folder = save_transformers(tmp_path_factory.mktemp("model"), model)
    with torch.no_grad():
        logits = [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS]
    assert min(float(piece.std()) for piece in logits) > 0.1  # logits of nothing would agree with anything
    return folder, logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_batch_of_whole_prompts(case: tuple[Path, list[Tensor]], backend: str) -> None:
    folder, expected = case
    runner = PagedRunner(load_or_skip(folder, backend))
    found = runner.run(*enumerate(PROMPTS))
    for logits, want in zip(found, expected, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_decodes_mixed_in_one_batch(case: tuple[Path, list[Tensor]], backend: str) -> None:
    """Each step every unfinished sequence advances by its own stride: 1 is a decode, more is a prompt chunk."""
    folder, expected = case
    runner = PagedRunner(load_or_skip(folder, backend), block_size=16)
    strides, done = [3, 1, 40, 1, 2], [0] * len(PROMPTS)
    collected: list[list[Tensor]] = [[] for _ in PROMPTS]
    while any(done[i] < len(prompt) for i, prompt in enumerate(PROMPTS)):
        pieces = [
            (i, prompt[done[i] : done[i] + strides[i]]) for i, prompt in enumerate(PROMPTS) if done[i] < len(prompt)
        ]
        for (i, tokens), logits in zip(pieces, runner.run(*pieces), strict=True):
            collected[i].append(logits)
            done[i] += len(tokens)
    for parts, want in zip(collected, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_only_for_the_rows_asked_for(case: tuple[Path, list[Tensor]], backend: str) -> None:
    folder, expected = case
    model = load_or_skip(folder, backend)
    runner = PagedRunner(model)
    ends = [36, 37, 127]  # last tokens of the first three prompts
    logits = model.forward(runner.batch(list(enumerate(PROMPTS[:3])), logits_rows=ends))
    assert logits.shape == (3, 256)
    for row, want in zip(logits, expected, strict=False):
        torch.testing.assert_close(row, want[-1], rtol=0, atol=TOLERANCE)
    nothing = model.forward(runner.batch([(7, [1, 2, 3])], logits_rows=[]))
    assert nothing.shape == (0, 256)


def test_contexts_beyond_the_original_one_turn_by_the_long_factors_of_longrope(tmp_path: Path) -> None:
    """transformers looks at the length of the sequence, we at the longest one that may come: keys are kept turned."""
    rope = {**LONGROPE, "original_max_position_embeddings": 64}
    model = make("Phi3", {"rope_parameters": rope, "original_max_position_embeddings": 64})
    folder = save_transformers(tmp_path, model)
    with torch.no_grad():
        long, short = (model(torch.tensor([prompt])).logits[0] for prompt in (PROMPTS[2], PROMPTS[0]))
    found = PagedRunner(load_or_skip(folder)).run((0, PROMPTS[2]))[0]
    torch.testing.assert_close(found, long, rtol=0, atol=TOLERANCE)
    found = PagedRunner(load_or_skip(folder)).run((0, PROMPTS[0]))[0]
    assert float((found - short).abs().max()) > 100 * TOLERANCE  # the two sets of factors do differ
    bounded = load_model(Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32"), "float32", max_positions=64)
    found = PagedRunner(bounded).run((0, PROMPTS[0]))[0]
    torch.testing.assert_close(found, short, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_block_size_does_not_matter(tmp_path: Path, block_size: int) -> None:
    model = make("Llama", {"rope_parameters": dict(LLAMA3)})
    decoder = load_or_skip(save_transformers(tmp_path, model))
    with torch.no_grad():
        want = model(torch.tensor([PROMPTS[0]])).logits[0]
    runner = PagedRunner(decoder, block_size=block_size)
    found = torch.cat([runner.run((0, PROMPTS[0][:20]))[0], runner.run((0, PROMPTS[0][20:]))[0]])
    torch.testing.assert_close(found, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_near_float32(tmp_path: Path, backend: str) -> None:
    """bfloat16 activations and cache: 2^-9 relative per rounding, some ten roundings deep, on logits of order 1."""
    model = make("Qwen3", {"head_dim": 32}).to(torch.bfloat16)
    folder = save_transformers(tmp_path, model)
    with torch.no_grad():
        want = model.float()(torch.tensor([PROMPTS[2]])).logits[0]
    decoder = load_or_skip(folder, backend, "bfloat16", kv_dtype="bfloat16")
    found = PagedRunner(decoder).run((0, PROMPTS[2]))[0]
    assert float((found - want).abs().mean()) < 0.02 * float(want.std())
    assert float((found - want).abs().max()) > 0  # it did run in bfloat16
