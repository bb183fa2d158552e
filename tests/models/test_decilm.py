"""DeciLM against Llama: a layer without attention is one whose output projection is zero, and so on.

Tolerance 1e-4: some layers of float32 arithmetic in different summation orders on logits of order 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.models.hf_config import parse_model_config
from tests import tiny
from tests.models.paged import BACKENDS, PagedRunner, load_or_skip

transformers = pytest.importorskip("transformers")

NO_OP = {"no_op": True, "replace_with_linear": False}


def attention(group: int) -> dict[str, Any]:
    return {"n_heads_in_group": group, "no_op": False, "replace_with_linear": False}


def ffn(mult: float) -> dict[str, Any]:
    return {"ffn_mult": mult, "no_op": False, "replace_with_linear": False}


LINEAR = {"no_op": False, "replace_with_linear": True}
BLOCKS = [
    {"attention": NO_OP, "ffn": ffn(2.0)},
    {"attention": attention(2), "ffn": ffn(6.5)},
    {"attention": attention(4), "ffn": NO_OP},
    {"attention": NO_OP, "ffn": NO_OP},
    {"attention": LINEAR, "ffn": LINEAR},
    {"attention": attention(1), "ffn": ffn(2.0)},
]
INNER = [256, 512, 0, 0, 0, 256]  # 2 / 3 * mult * 64, up to a multiple of 256
HEADS, HIDDEN, DIM = 4, 64, 16


def decilm_config() -> tiny.Config:
    config = tiny.llama_config(architectures=["DeciLMForCausalLM"], model_type="nemotron-nas", num_hidden_layers=6)
    return {**config, "block_configs": BLOCKS, "num_key_value_heads": None, "intermediate_size": None}


def decilm_tensors(seed: int = 0) -> tiny.Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"model.embed_tokens.weight": torch.randn(320, HIDDEN, generator=generator)}
    for i, block in enumerate(BLOCKS):
        prefix = f"model.layers.{i}"
        if not block["attention"]["no_op"]:
            tensors[f"{prefix}.input_layernorm.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
        if block["attention"] is LINEAR:
            tensors[f"{prefix}.self_attn.linear_attn.weight"] = normal(HIDDEN, HIDDEN)
        elif not block["attention"]["no_op"]:
            kv = HEADS // block["attention"]["n_heads_in_group"] * DIM
            for name, n in (("q_proj", HEADS * DIM), ("k_proj", kv), ("v_proj", kv), ("o_proj", HIDDEN)):
                tensors[f"{prefix}.self_attn.{name}.weight"] = normal(n, HIDDEN)
        if not block["ffn"]["no_op"]:
            tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
        if block["ffn"] is LINEAR:
            tensors[f"{prefix}.mlp.linear_mlp.weight"] = normal(HIDDEN, HIDDEN)
        elif INNER[i]:
            for name, shape in (
                ("gate_proj", (INNER[i], HIDDEN)),
                ("up_proj", (INNER[i], HIDDEN)),
                ("down_proj", (HIDDEN, INNER[i])),
            ):
                tensors[f"{prefix}.mlp.{name}.weight"] = normal(*shape)
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
    tensors["lm_head.weight"] = normal(320, HIDDEN)
    return tensors


class Nothing(torch.nn.Module):
    """In place of attention (which gives a pair) or of a feed-forward."""

    def __init__(self, pair: bool, linear: Tensor | None = None) -> None:
        super().__init__()
        self.pair, self.linear = pair, linear

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = torch.zeros_like(hidden_states) if self.linear is None else hidden_states @ self.linear.t()
        return (out, None) if self.pair else out


def reference(tensors: tiny.Tensors) -> Any:
    """transformers' Llama, its layers changed one by one into what DeciLM's are."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    values = {
        k: v
        for k, v in tiny.llama_config(num_hidden_layers=6, num_key_value_heads=HEADS).items()
        if k != "architectures"
    }
    config = transformers.LlamaConfig(**values, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    own = dict(tensors)
    for i, (layer, block) in enumerate(zip(model.model.layers, BLOCKS, strict=True)):
        prefix = f"model.layers.{i}"
        if block["attention"]["no_op"] or block["attention"] is LINEAR:
            layer.self_attn = Nothing(True, own.pop(f"{prefix}.self_attn.linear_attn.weight", None))
        else:
            group = block["attention"]["n_heads_in_group"]
            for name in ("k_proj", "v_proj"):  # each KV head stands for a group of heads: repeat it for each of them
                key = f"{prefix}.self_attn.{name}.weight"
                own[key] = own[key].view(-1, DIM, HIDDEN).repeat_interleave(group, dim=0).flatten(0, 1)
        if INNER[i]:
            layer.mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER[i]))
        else:
            layer.mlp = Nothing(False, own.pop(f"{prefix}.mlp.linear_mlp.weight", None))
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected
    assert all("layernorm" in name for name in missing)  # before what is not there
    return model


PROMPTS = [torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 1, 60)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_the_changed_llama(tmp_path: Path, backend: str) -> None:
    tensors = decilm_tensors()
    model = reference(tensors)
    folder = tiny.write_plain(tmp_path, decilm_config(), tensors)
    runner = PagedRunner(load_or_skip(folder, backend))
    assert len(runner.kv) == 3
    first = runner.run((0, PROMPTS[0]), (1, PROMPTS[1]), (2, PROMPTS[2][:21]))
    rest = torch.cat([first[2], runner.run((2, PROMPTS[2][21:22]))[0], runner.run((2, PROMPTS[2][22:]))[0]])
    with torch.no_grad():
        expected = [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS]
    for found, want in zip((first[0], first[1], rest), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_the_engine_s_greedy_tokens_are_the_reference_s_and_nvfp4_loads(tmp_path: Path) -> None:
    tensors = decilm_tensors(seed=1)
    model = reference(tensors)
    folder = tiny.write_plain(tmp_path / "plain", decilm_config(), tensors)
    llm = LLM(folder, dtype="float32", num_blocks=9, max_model_len=96, max_num_batched_tokens=32)
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12)
    expected = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                logits[258] = -torch.inf  # EOS, which min_tokens forbids
                tokens.append(int(logits.argmax()))
        expected.append(tokens[len(prompt) :])
    assert [result.token_ids for result in llm.generate(PROMPTS, params)] == expected
    packed = tiny.write_modelopt(tmp_path / "nvfp4", decilm_config(), tensors, share_scale_2=False)
    assert LLM(packed, num_blocks=33).generate([PROMPTS[0]], params)[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(block_configs=None), "block_configs is None; expected a list of 6 layers"),
        (lambda c: c["block_configs"].pop(), "expected a list of 6 layers"),
        (lambda c: c["block_configs"][1]["attention"].update(n_heads_in_group=3), "n_heads_in_group is 3"),
        (lambda c: c["block_configs"][1]["attention"].update(n_heads_in_group=None), "n_heads_in_group is None"),
        (lambda c: c["block_configs"][1]["ffn"].update(ffn_mult=0), "ffn_mult is 0; expected more than 0"),
        (lambda c: c["block_configs"][1]["ffn"].update(ffn_mult=float("nan")), "ffn_mult is nan"),
        (lambda c: c["block_configs"][1].update(ffn=[]), r"block_configs\[1\].ffn is \[\]"),
        (lambda c: c["block_configs"][1]["attention"].update(num_sink_tokens=4), "num_sink_tokens is 4"),
    ],
)
def test_layers_that_cannot_be_are_refused_by_field_and_value(change: Any, words: str) -> None:
    config = json.loads(json.dumps(decilm_config()))
    change(config)
    with pytest.raises(UnsupportedFormatError, match=words):
        parse_model_config(config)
