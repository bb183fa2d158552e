"""Mixed precision: what is measured is what quantising one group does, and a budget is spent where it saves most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.detect import read_config
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.calibrate import tokenize
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.plan import Plan, make_plan
from nvfp4_runtime.quantize.recipes import fused_group
from nvfp4_runtime.quantize.sensitivity import Sensitivity, measure, spend
from tests import tiny
from tests.models.paged import PagedRunner, load_or_skip

TEXTS = ["The quick brown fox jumps over the lazy dog; then it sleeps. " * 4]
EXACT = "model.layers.0.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny.llama_config(dtype="bfloat16")
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    tensors[f"{EXACT}.weight"] = torch.sign(tensors[f"{EXACT}.weight"]) * 0.125  # NVFP4 holds these exactly
    return tiny.write_plain(tmp_path / "src", config, tensors)


def plan_of(folder: Path, **options) -> Plan:
    return make_plan(Shards(folder), read_config(folder), **options)


def test_each_group_costs_what_a_checkpoint_with_only_it_quantised_loses(source, tmp_path):
    measured = measure(source, TEXTS, plan_of(source), backend="reference", progress=False)
    assert measured.keys() == {group.key for group in plan_of(source).groups}
    assert measured[fused_group(EXACT)].nvfp4 < 1e-8  # float32 sums in another order
    (ids,) = tokenize(source, TEXTS)
    wanted = torch.log_softmax(PagedRunner(load_or_skip(source)).run((0, ids))[0], dim=-1)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        key = fused_group(module)
        others = [m for group in plan_of(source).groups if group.key != key for m in group.modules]
        out = tmp_path / key.replace("/", "_")
        quantize_folder(source, out, exclude=others, progress=False)
        found = torch.log_softmax(PagedRunner(load_or_skip(out)).run((0, ids))[0], dim=-1)
        kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        assert measured[key].nvfp4 == pytest.approx(kl, rel=0.01)
        assert 0 < measured[key].fp8 < measured[key].nvfp4


def test_a_budget_goes_where_it_saves_most_per_bit_and_is_kept(source):
    plan = plan_of(source)
    keys = [group.key for group in plan.groups]
    even = {key: Sensitivity(0.01, 0.001) for key in keys}
    assert set(spend(plan, even, 4.5).values()) == {"nvfp4"}
    dear = fused_group("model.layers.1.self_attn.o_proj")
    chosen = spend(plan, even | {dear: Sensitivity(1.0, 0.1)}, 5.0)
    assert chosen[dear] in ("fp8", None)
    with pytest.raises(ConfigError, match="nothing needs quantising"):
        spend(plan, even, 16.0)
    for budget in (4.6, 5.0, 6.5, 9.0):
        chosen = spend(plan, even | {dear: Sensitivity(1.0, 0.1)}, budget)
        bits = {"nvfp4": 4.5, "fp8": 8.0, None: 16.0}
        total = sum(group.num_weights for group in plan.groups)
        spent = sum(group.num_weights * bits[chosen[group.key]] for group in plan.groups) / total
        assert spent <= budget
        assert spent > budget - 1.5  # six of eight groups are small
    with pytest.raises(ConfigError, match="fewer than NVFP4 itself"):
        spend(plan, even, 4.0)


def test_the_command_line_way_writes_a_mixed_checkpoint(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_folder(source, out, calib_texts=TEXTS, bits_budget=6.0, progress=False)
    assert report.algo == "MIXED_PRECISION"
    layers = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    assert {layer["quant_algo"] for layer in layers.values()} == {"NVFP4", "FP8"}
    assert layers[EXACT]["quant_algo"] == "NVFP4", "nothing is gained there"


@pytest.mark.parametrize("options", [{}, {"calib_texts": TEXTS, "fp8": ["*.q_proj"]}])
def test_a_budget_needs_a_text_and_no_patterns(source, tmp_path, options):
    with pytest.raises(ConfigError, match="give --calib and no --fp8"):
        quantize_folder(source, tmp_path / "out", bits_budget=6.0, progress=False, **options)
