"""Small sound checkpoints, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.decode import matrix
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.report import Finding, Report
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import modules
from tests import tiny

Tensors = dict[str, Tensor]
_INPUTS = {"qkv": 0.010, "o_proj": 0.004, "gate_up": 0.012, "down_proj": 0.031}
UP, GATE, Q, DOWN = (
    f"model.layers.0.{name}" for name in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj", "mlp.down_proj")
)
NUM_EXPERTS = 4


def parent_tensors(experts: bool = False, **config: int) -> tuple[tiny.Config, Tensors]:
    """config.json and BF16 weights. Rows and columns have sizes of their own, as trained weights do."""
    full = tiny.llama_config(dtype="bfloat16", **config)
    tensors = tiny.random_tensors(full, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    if experts:
        full |= {"num_experts": NUM_EXPERTS, "architectures": ["BailingMoeForCausalLM"]}
        tensors = {name: t for name, t in tensors.items() if ".mlp." not in name}
        for layer in range(full["num_hidden_layers"]):
            for e in range(NUM_EXPERTS):
                for leaf, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
                    name = f"model.layers.{layer}.mlp.experts.{e}.{leaf}.weight"
                    tensors[name] = (0.1 * torch.randn(shape, generator=generator)).bfloat16()
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            rows = torch.rand(tensor.shape[0], 1, generator=generator) + 0.5
            columns = torch.rand(1, tensor.shape[1], generator=generator) + 0.5
            tensors[name] = (tensor * rows * columns).bfloat16()
    return full, tensors


def sound(folder: Path, experts: bool = False, shards: int = 1, **config: int) -> tuple[Path, Path]:
    """(NVFP4 folder, BF16 parent folder): ModelOpt's layout, calibrated, without anything to find."""
    full, tensors = parent_tensors(experts, **config)
    parent = tiny.write_plain(folder / "parent", full, tensors, tokenizer=False)
    quantised = tiny.write_modelopt(folder / "nvfp4", full, tensors, tokenizer=False)

    def calibrate(packed: Tensors) -> None:
        for name in packed:
            if name.endswith(".input_scale"):
                leaf = name.split(".")[-2]
                layer = int(name.split(".")[2])
                packed[name] = torch.tensor(_INPUTS[tiny._FUSED.get(leaf, leaf)] * (1 + 0.1 * layer))

    edit(quantised, calibrate)
    if shards > 1:
        packed = load_file(quantised / "model.safetensors")
        (quantised / "model.safetensors").unlink()
        tiny.save_shards(quantised, packed, shards)
    return quantised, parent


def edit(folder: Path, change: Callable[[Tensors], None], file: str = "model.safetensors") -> None:
    """Load a file's tensors, let `change` have them, write them back."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})


def edit_json(folder: Path, name: str, change: Callable[[tiny.Config], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def found(report: Report, id: str) -> Finding:
    """The one finding `id`."""
    matching = [finding for finding in report.findings if finding.id == id]
    assert len(matching) == 1, f"{len(matching)} findings {id} among {[f.id for f in report.findings]}"
    assert len(matching[0].message) > 20
    assert len(matching[0].remedy) > 3
    return matching[0]


def alarms(folder: Path, parent: Path | None = None) -> list[str]:
    """Ids of all errors and warnings."""
    return [finding.id for finding in inspect(folder, parent).findings if finding.severity != "info"]


def dequantised(folder: Path) -> Tensors:
    """Every quantised layer in float32."""
    shards = Shards(folder)
    result = {}
    for stored in modules(shards):
        if (weight := matrix(shards, stored)) is not None:
            result[stored.prefix] = weight.rows(0, weight.n)
    return result
