"""LoRA adapters in PEFT's layout, written from scratch, and the weights that merging them gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Matrices = dict[str, tuple[Tensor, Tensor]]  # module -> (A [r, k], B [n, r])


def random_matrices(tensors: Mapping[str, Tensor], targets: tuple[str, ...], rank: int, seed: int) -> Matrices:
    """Matrices for every module of `tensors` whose last name is in `targets`; they change the logits visibly."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rpartition(".")[2] in targets:
            n, k = tensor.shape
            a = torch.randn(rank, k, generator=generator) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * 0.3
            found[module] = (a.to(torch.bfloat16).float(), b.to(torch.bfloat16).float())
    return found


def write_adapter(folder: Path, matrices: Matrices, rank: int, alpha: float = 16, **config: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors as PEFT writes them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({module.rpartition(".")[2] for module in matrices})
    whole = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": targets,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
        "base_model_name_or_path": "somewhere/else",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    tensors = {}
    for module, (a, b) in matrices.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merged(tensors: Mapping[str, Tensor], matrices: Matrices, scaling: float) -> dict[str, Tensor]:
    """The model's tensors with an adapter added to them."""
    changed = {f"{module}.weight": scaling * b @ a for module, (a, b) in matrices.items()}
    return {name: tensor + changed[name] if name in changed else tensor for name, tensor in tensors.items()}
