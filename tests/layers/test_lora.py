"""LoRA adapters: the logits of merged weights, in any company; and adapters that cannot be, refused by name.

Tolerance 2e-4 in float32: two layers in different summation orders on logits of order 1, the low-rank product apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.config import AdapterConfig
from nvfp4_runtime.errors import CheckpointError, ConfigError, InvalidParameterError
from nvfp4_runtime.llm import Generation
from tests import tiny
from tests.adapters import merged, random_matrices, write_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 60)), [300], list(range(20, 55))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, min_tokens=10, logprobs=0)
ADAPTERS: dict[str, tuple[tuple[str, ...], int, dict[str, Any], float]] = {
    "all": (ALL, 8, {"alpha": 16}, 2.0),
    "qv": (("q_proj", "v_proj"), 4, {"alpha": 8, "use_rslora": True}, 4.0),
    "down": (("down_proj",), 3, {"alpha": 3, "alpha_pattern": {"layers.1.mlp.down_proj": 3.0}}, 1.0),
}
FAMILIES = {
    "llama": tiny.llama_config(),
    "llama tied": tiny.llama_config(tie_word_embeddings=True),
    "qwen2": tiny.qwen2_config(),
    "qwen3": tiny.qwen3_config(),
    "deepseek_v3": tiny.deepseek_v3_config(),
}
TARGETS = {"deepseek_v3": ("q_b_proj", "kv_a_proj_with_mqa", "o_proj")}


def bits(result: Generation) -> tuple[list[int], list[float]]:
    return result.token_ids, [entry.logprob for entry in result.logprobs]


def prepare(folder: Path, family: str) -> tuple[Path, tiny.Tensors, list[AdapterConfig]]:
    """A plain model, its tensors, and the adapters of ADAPTERS."""
    config = FAMILIES[family]
    tensors = tiny.random_tensors(config, seed=2)
    tiny.write_plain(folder / "model", config, tensors)
    loaded = []
    for i, (name, (targets, rank, options, _)) in enumerate(ADAPTERS.items()):
        matrices = random_matrices(tensors, TARGETS.get(family, targets), rank, seed=i)
        write_adapter(folder / name, matrices, rank, **options)
        loaded.append(AdapterConfig(name, str(folder / name)))
    return folder / "model", tensors, loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_the_answers_of_the_merged_weights(tmp_path: Path, family: str) -> None:
    folder, tensors, adapters = prepare(tmp_path, family)
    llm = LLM(folder, dtype="float32", num_blocks=65, adapters=tuple(adapters))
    assert [(a.name, a.rank) for a in llm.info.adapters] == [("all", 8), ("qv", 4), ("down", 3)]
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    plain = llm.generate(PROMPTS, scored)
    for i, (name, (targets, rank, _, scaling)) in enumerate(ADAPTERS.items()):
        matrices = random_matrices(tensors, TARGETS.get(family, targets), rank, seed=i)
        tiny.write_plain(tmp_path / f"merged-{name}", FAMILIES[family], merged(tensors, matrices, scaling))
        expected = LLM(tmp_path / f"merged-{name}", dtype="float32", num_blocks=65).generate(PROMPTS, scored)
        found = llm.generate(PROMPTS, scored, name)
        for one, want, without in zip(found, expected, plain, strict=True):
            values, wanted, other = ([e.logprob for e in r.prompt_logprobs if e] for r in (one, want, without))
            assert values == pytest.approx(wanted, abs=2e-4)
            assert not wanted or max(abs(a - b) for a, b in zip(wanted, other, strict=True)) > 0.01


def test_requests_of_several_adapters_and_none_share_a_batch_without_changing_a_bit(tmp_path: Path) -> None:
    config = tiny.llama_config(dtype="bfloat16")
    tensors = tiny.random_tensors(config, seed=2)
    folder = tiny.write_modelopt(tmp_path / "model", config, tensors)
    adapters = []
    for i, (name, (targets, rank, _, _)) in enumerate(ADAPTERS.items()):
        path = write_adapter(tmp_path / name, random_matrices(tensors, targets, rank, i), rank)
        adapters.append(AdapterConfig(name, str(path)))
    options: dict[str, Any] = {"num_blocks": 129, "numerics": "w4a16"}
    llm = LLM(folder, adapters=tuple(adapters), **options)
    if {group.backend for group in llm.info.layers} != {"cpu"}:
        pytest.skip("the plain kernels are not batch invariant: build the extension (backend cpu)")
    names = ["all", "", "qv", "down", "", "all", "qv", ""]
    prompts = [PROMPTS[i % 4] for i in range(8)]
    alone = [bits(llm.generate([p], GREEDY, n)[0]) for p, n in zip(prompts, names, strict=True)]
    assert [bits(r) for r in llm.generate(prompts, GREEDY, names)] == alone
    chunked = LLM(folder, adapters=tuple(adapters), max_num_batched_tokens=16, **options)
    assert [bits(r) for r in chunked.generate(prompts, GREEDY, names)] == alone
    base = LLM(folder, **options).generate([p for p, n in zip(prompts, names, strict=True) if not n], GREEDY)
    assert [bits(r) for r in base] == [b for b, n in zip(alone, names, strict=True) if not n]


def test_the_prefix_cache_is_not_shared_between_adapters(tmp_path: Path) -> None:
    folder, _, adapters = prepare(tmp_path, "llama")
    llm = LLM(folder, num_blocks=65, adapters=tuple(adapters))
    prompt = [PROMPTS[1]]
    for name in ("", "all", "qv"):
        assert llm.generate(prompt, GREEDY, name)[0].num_cached_tokens == 0
        assert llm.generate(prompt, GREEDY, name)[0].num_cached_tokens == 32


def test_an_adapter_that_is_not_loaded_is_refused_by_name(tmp_path: Path) -> None:
    folder, _, adapters = prepare(tmp_path, "llama")
    llm = LLM(folder, num_blocks=65, adapters=tuple(adapters))
    with pytest.raises(InvalidParameterError, match="'none' is not loaded; loaded are: 'all', 'qv', 'down'"):
        llm.generate([[1]], GREEDY, "none")


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_tensors(edit: Callable[[tiny.Tensors], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "only a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "has no adapter_model.safetensors.*never read",
    ),
    "DoRA": (change_config(use_dora=True), "use_dora is True"),
    "IA3": (change_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "modules_to_save": (change_config(modules_to_save=["lm_head"]), "modules_to_save is"),
    "biases": (change_config(bias="lora_only"), "bias is 'lora_only'"),
    "another rank": (change_config(r=5), "has the rank 8, and adapter_config.json says 5"),
    "no alpha": (change_config(lora_alpha=None), "lora_alpha is None; expected a positive number"),
    "alpha of NaN": (change_config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "a pattern that is none": (change_config(rank_pattern={"(a+)+$": 4}), "the pattern '\\(a\\+\\)\\+\\$'"),
    "a rank beyond the bound": (change_config(r=8), "at most 4 is allowed"),
    "half a pair": (change_tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")), "q_proj has no lora_B.weight"),
    "an unknown module": (
        change_tensors(lambda t: t.update({k.replace("q_proj", "nowhere"): v.clone() for k, v in list(t.items())})),
        "nowhere.*no linear layer",
    ),
    "the head": (
        change_tensors(
            lambda t: t.update(
                {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 64)}
                | {"base_model.model.lm_head.lora_B.weight": torch.ones(320, 8)}
            )
        ),
        "lm_head.lora_A",
    ),
    "another tensor": (change_tensors(lambda t: t.update({"x.weight": torch.ones(2)})), "'x.weight' is no LoRA matrix"),
    "NaN": (change_tensors(lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(float("nan"))), "holds NaN or Inf"),
    "another model's shape": (
        change_tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(8, 60)})),
        "expected.*8, 64",
    ),
    "a vector": (change_tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(8)})), "rank, in features"),
    "nothing": (change_tensors(lambda t: t.clear()), "holds no tensors"),
    "a truncated file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:200]),
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adapter_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config)
    folder = tiny.write_plain(tmp_path / "model", config, tensors)
    adapter = write_adapter(tmp_path / "adapter", random_matrices(tensors, ALL, 8, 0), 8)
    change, words = HOSTILE[name]
    change(adapter)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        LLM(
            folder,
            num_blocks=9,
            adapters=(AdapterConfig("a", str(adapter)),),
            max_lora_rank=4 if "bound" in name else 64,
        )


def test_adapters_need_an_implementation_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder, _, adapters = prepare(tmp_path, "llama")
    with pytest.raises(ConfigError, match="--lora-modules needs an implementation of ours"):
        LLM(folder, num_blocks=9, model_impl="transformers", adapters=tuple(adapters))
