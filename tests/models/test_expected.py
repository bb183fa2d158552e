"""The table that `nvfp4 inspect` goes by is what the models read: every tensor of each family, and none besides."""

from __future__ import annotations

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import loose, modules
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import ARCHITECTURES, load_model
from nvfp4_runtime.models.expected import expected
from nvfp4_runtime.models.hf_config import FAMILIES
from tests import tiny, tiny_families

CONFIGS = [
    tiny.llama_config(),
    tiny.llama_config(tie_word_embeddings=True),
    tiny.llama_config(attention_bias=True, mlp_bias=True, head_dim=32),
    tiny.llama_config(architectures=["MistralForCausalLM"], sliding_window=None),
    tiny.qwen2_config(),
    tiny.qwen3_config(),
    tiny.qwen3_config(attention_bias=True),
    tiny.mixtral_config(),
    tiny.qwen2_moe_config(),
    tiny.qwen3_moe_config(mlp_only_layers=[0]),
    tiny.glm4_moe_config(),
    tiny.glm4_moe_lite_config(),
    tiny.deepseek_v3_config(),
    tiny.deepseek_v3_config(q_lora_rank=None),
    tiny_families.phi3_config(),
    tiny_families.minimax_m2_config(),
    tiny_families.ministral3_config(),
    tiny_families.ministral3_config(architectures=["MinistralForCausalLM"], sliding_window=None),
]


def test_every_served_family_is_compared():
    compared = {config["architectures"][0] for config in CONFIGS}
    assert compared == {name for name, file in ARCHITECTURES.items() if file == "llama"} <= set(FAMILIES)
    assert expected(tiny.nemotron_h_config()) is None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["architectures"][0])
def test_the_table_names_exactly_what_the_loader_reads(tmp_path, config):
    folder = tiny.write_plain(tmp_path, config, tiny.random_tensors(config), tokenizer=False)
    load_model(
        Checkpoint.open(folder), Kernels([ReferenceBackend()], "float32")
    )  # which refuses a folder with too few tensors or too many
    shards = Shards(folder)
    stored = {layer.prefix: layer for layer in modules(shards)}
    wanted = expected(config).placed(set(stored))
    assert {item.info.name: item.info.shape for item in loose(shards)} == wanted.loose
    table = {name: module for name, module in wanted.modules.items() if not module.optional}
    assert set(stored) == set(table)
    for name, module in table.items():
        assert shards.require(f"{name}.weight").shape == module.shape
        assert ("bias" in stored[name].tensors) is module.bias


@pytest.mark.parametrize("names", [None, [], ["A", "B"], ["DbrxForCausalLM"], "LlamaForCausalLM", [None], [{}]])
def test_architectures_without_a_model_have_no_table(names):
    assert expected({"architectures": names}) is None
