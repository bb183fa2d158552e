"""Step times between what was measured, GPUs by their data sheets, and checkpoints by their headers."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.plan.checkpoint import Weights, read_weights
from loadtest.plan.command import read_measured
from loadtest.plan.gpus import GPUS
from loadtest.plan.steps import Measured, MeasuredTimes, Modelled, Ranks
from nvfp4_runtime.engine.cost import ModelCost

MEASURED = Measured(
    "nvfp4-step-times-2", "now", {"cpu": "2 x test"}, "model", [], 8, 256, 16, 4096, 0.005,
    [(1.0, 0.010), (4.0, 0.016)], [(100.0, 0.1), (200.0, 0.3)], 1e-6, 1e-7, 20, 1.0,
)  # fmt: skip


@dataclass
class Entry:
    start: int
    count: int
    samples: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass
class Plan:
    entries: tuple[Entry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)


@pytest.mark.parametrize(
    ("entries", "seconds"),
    [
        ([Entry(100, 1)], 0.010 + 101e-6),
        ([Entry(0, 1)] * 2, 0.012 + 2e-6),
        ([Entry(0, 1)] * 6, 0.020 + 6e-6),  # beyond what was measured: on as between 1 and 4
        ([Entry(0, 50)], 0.010 + 0.05),
        ([Entry(0, 150)], 0.010 + 0.2),
        ([Entry(1000, 100)], 0.010 + 0.1 + 0.01),  # a later chunk sees the earlier ones
        ([Entry(10, 1), Entry(0, 100)], 0.010 + 11e-6 + 0.1),
    ],
)
def test_measured_steps_add_up(entries, seconds):
    assert MeasuredTimes(MEASURED).seconds(Plan(tuple(entries))) == pytest.approx(seconds)


def test_a_modelled_step_is_bound_by_memory_or_by_arithmetic():
    gpu = GPUS["b200"]
    cost = ModelCost(16e9, 4e9, row_flops=1e9, head_bytes=1e9, windows={None: 1})
    one, many = Plan((Entry(0, 1),)), Plan((Entry(0, 8192),))
    w4a16, w4a4 = Modelled(gpu, cost, "w4a16"), Modelled(gpu, cost, "w4a4")
    assert w4a16.seconds(one) == pytest.approx(0.0015 + 5e9 / (7.7e12 * 0.75))
    assert w4a16.seconds(many) == pytest.approx(0.0015 + (16e9 * 8192 + 1e9) / (2250e12 * 0.6))
    assert w4a4.seconds(many) - 0.0015 == pytest.approx((w4a16.seconds(many) - 0.0015) / 4)
    assert GPUS["h100"].peak_flops("w4a4") == GPUS["h100"].peak_flops("w4a16")  # no FP4 there
    assert "not measured" in w4a4.source


def test_ranks_share_the_work_and_exchange_their_sums():
    gpu = GPUS["h100"]
    cost = ModelCost(16e9, 4e9, row_flops=1e9, head_bytes=1e9, windows={None: 1})
    weights = Weights(cost, 6_000_000_000, 8.0, 4096, 1_000_000_000, 4096, 32, 32, 2)
    part = weights.part(4)
    assert part.weight_bytes == 1e9 + 5e9 / 4  # the embedding is on all
    assert part.kv_token_bytes == 4.0  # two heads of keys on four ranks: each keeps one
    assert (part.cost.step_bytes, part.cost.head_bytes, part.cost.token_flops) == (1e9, 0.25e9, 4e9)
    one, many = Plan((Entry(0, 1),)), Plan((Entry(0, 8192),))
    times = Modelled(gpu, part.cost, "w4a16", Ranks(4, 4096, 32))
    assert "4 x H100" in times.source
    layers = 32 * (100e-6 + 2 * 20e-6)
    received = 2 * 32 * 3 * 4096 * 4 / (450e9 * 0.75)  # seconds for each token: FP32 from three others, twice a layer
    assert times.seconds(one) == pytest.approx(0.0015 + 1.25e9 / (3.35e12 * 0.75) + layers + received)
    arithmetic = (4e9 * 8192 + 0.25e9) / (989e12 * 0.6)
    assert times.seconds(many) == pytest.approx(0.0015 + arithmetic + layers + 8192 * received)
    alone = Modelled(gpu, cost, "w4a16")
    assert Modelled(gpu, weights.part(1).cost, "w4a16", Ranks(1, 4096, 32)).seconds(many) == alone.seconds(many)
    with pytest.raises(ValueError, match="expected 1 to 32"):
        weights.part(33)


def checkpoint(folder, config, tensors):
    """A safetensors file of zeros: name -> (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIG = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "max_position_embeddings": 512,
}  # fmt: skip


def test_a_checkpoint_is_measured_by_its_headers(tmp_path):
    packed = {
        "model.embed_tokens.weight": ("BF16", [100, 64], 12800),
        "model.layers.0.q_proj.weight": ("U8", [64, 32], 2048),
        "model.layers.0.q_proj.weight_scale": ("F8_E4M3", [64, 4], 256),
    }
    found = read_weights(checkpoint(tmp_path, CONFIG, packed))
    assert found.weight_bytes == 12800 + 2048 + 256
    assert found.cost.token_flops == 2 * 64 * 64  # two weights in a byte, none in a scale
    assert found.cost.step_bytes == 2304
    assert (found.cost.row_flops, found.cost.head_bytes) == (2 * 6400, 12800)  # the embedding is the head
    assert found.kv_token_bytes == 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, width, bytes
    assert found.cost.pair_flops == 2 * 4 * 2 * 16


def test_of_routed_experts_a_token_passes_some(tmp_path):
    config = CONFIG | {"num_experts": 8, "num_experts_per_tok": 2}
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": ("BF16", [8, 64], 1024) for i in range(8)}
    cost = read_weights(checkpoint(tmp_path, config, tensors)).cost
    assert (cost.expert_bytes, cost.expert_share, cost.token_flops) == (8192, 0.25, 2 * 0.25 * 8 * 512)


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "no config.json"), (CONFIG, r"no \*.safetensors"), (CONFIG | {"mamba_num_heads": 2}, "not modelled yet")],
)
def test_a_folder_that_cannot_be_planned_for_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_measured_steps_are_read_from_their_file_and_from_no_other(tmp_path):
    file = tmp_path / "m.json"
    file.write_bytes(msgspec.json.encode(MEASURED))
    assert read_measured(file) == MEASURED
    file.write_text("{}")
    with pytest.raises(ValueError, match="not a file of `python -m loadtest calibrate`"):
        read_measured(file)


def test_the_fewest_replicas_that_keep_the_slo_are_found(tmp_path, capsys):
    file = tmp_path / "m.json"
    file.write_bytes(msgspec.json.encode(MEASURED))
    flags = ["plan", "--gpu", str(file), "--workload", "60/20", "--rate", "8", "--seconds", "4"]
    flags += ["--slo", "ttft=0.3,tpot=0.05"]
    assert main([*flags, "--json", str(tmp_path / "plan.json")]) == 0
    made = json.loads((tmp_path / "plan.json").read_text())
    shares = {row["replicas"]: row["figures"]["attainment"] for row in made["rows"]}
    assert made["fewest"] > 1
    assert shares[made["fewest"]] >= 0.95 > shares[made["fewest"] - 1]
    assert "measured now on 2 x test" in capsys.readouterr().out
    assert main([*flags, "--replicas", "1"]) == 1
    assert "none of them keeps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h1000"], "unknown GPU 'h1000'; expected a100"),
        (["--gpu", "h100"], "needs --model DIR"),
        (["--gpu", "h100", "--model", "{folder}", "--replicas", "0"], "expected counts of 1 to 1000"),
        (["--gpu", "h100", "--model", "{folder}", "--max-model-len", "999999999999"], "does not fit"),
        (["--gpu", "h100", "--model", "{folder}", "--tensor-parallel-size", "5"], "expected 1 to 4, its heads"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(tmp_path, capsys, flags, message):
    checkpoint(tmp_path, CONFIG, {"model.embed_tokens.weight": ("BF16", [100, 64], 12800)})
    assert main(["plan", *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
