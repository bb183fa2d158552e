"""The student: a transformers module whose NVFP4 layers round as they are served, and the float32 weights behind it.

What computes is in the working dtype and holds rounded values; what learns is a float32 master of each. Gradients are
gathered with the masters, in float32; after every optimizer step masters are rounded anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.distill import fake_quant
from nvfp4_runtime.distill.compilation import compiled
from nvfp4_runtime.distill.hf import load_plain
from nvfp4_runtime.distill.linear import FakeQuantLinear, Site
from nvfp4_runtime.distill.start import starting_weights
from nvfp4_runtime.errors import (
    ConfigError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
    UnsupportedFormatError,
)
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from nvfp4_runtime.quantize.layerwise import SITE_MODULES

logger = logging.getLogger(__name__)

BlockScales = Literal["frozen", "max"]
BLOCK_SCALES: tuple[BlockScales, ...] = get_args(BlockScales)
Train = Literal["all", "layers", "scales"]
TRAIN: tuple[Train, ...] = get_args(Train)


@dataclass
class Layer:
    """One NVFP4 layer: the module that computes, and what it is rounded with.

    weights      fp32 [N, K]
    block_scale  e4m3 [N, K/16];  scale_2  fp32 [], frozen
    steps        fp32 [N, K/16] block_scale * scale_2 before it is rounded, where they are what learns; else None
    """

    linear: FakeQuantLinear
    weights: Tensor
    block_scale: Tensor
    scale_2: Tensor
    policy: BlockScales
    steps: Tensor | None = None

    @property
    def master(self) -> Tensor:
        """What learns."""
        return self.weights if self.steps is None else self.steps

    def refresh(self) -> None:
        """Round the master into the module."""
        if self.steps is not None:
            scale = (self.steps / self.scale_2).clamp(codec.E4M3_MIN_SUBNORMAL, codec.E4M3_MAX)
            self.block_scale = scale.to(torch.float8_e4m3fn)
        elif self.policy == "max":
            self.block_scale = fake_quant.max_block_scales(self.weights, self.scale_2)
        operand = compiled(fake_quant.weight_operand)(self.weights, self.block_scale, self.scale_2)
        self.linear.weight.copy_(operand)

    def to_master(self, gradient: Tensor) -> Tensor:
        """The master's gradient by that of the dequantised weight.

        Straight through for weights. A step moves a value by its code, and by what rounding left out: as in learned
        step size quantisation (Esser et al., 2020), code - w / step inside the range, the code where it saturates.
        """
        if self.steps is None:
            return gradient
        blocks = self.weights.reshape(self.weights.shape[0], -1, codec.BLOCK)
        scale = self.block_scale.to(torch.float32).unsqueeze(-1)
        exact = blocks / (scale * self.scale_2)
        codes = fake_quant.round_e2m1(exact)
        moved = torch.where(exact.abs() <= codec.E2M1_MAX, codes - exact, codes)
        return (gradient.to(torch.float32).reshape(blocks.shape) * moved).sum(dim=-1)


@dataclass
class Student:
    """model    what computes
    layers   NVFP4 layers by module name, as in the checkpoint
    plain    other trained parameters by tensor name
    masters  trained float32 tensors by tensor name; their .grad is where gradients gather
    dtypes   what the other parameters are stored in, and so rounded to
    """

    model: nn.Module
    folder: Path
    layers: dict[str, Layer]
    plain: dict[str, nn.Parameter] = field(default_factory=dict)
    masters: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round every master into the module."""
        for layer in self.layers.values():
            layer.refresh()
        for name, parameter in self.plain.items():
            parameter.copy_(self.masters[name].to(self.dtypes[name]))

    def trainable(self) -> Iterator[Tensor]:
        return iter(self.masters.values())

    def zero_grad(self) -> None:
        for master in self.masters.values():
            if master.grad is not None:
                master.grad.zero_()


def build_student(
    teacher_folder: Path,
    folder: Path,
    numerics: Numerics,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    block_scales: BlockScales = "frozen",
    train: Train = "all",
) -> Student:
    """The NVFP4 checkpoint `folder` (ModelOpt's layout) as a trainable module.

    train  "all"; "layers": neither embedding nor head; "scales": block scales alone, every weight stays

    Raises ConfigError where W4A4 is asked of a checkpoint without input scales, UnsupportedFormatError for layouts,
    formats and modules that cannot be trained here.
    """
    device = device or torch.device("cpu")
    ckpt = Checkpoint.open(folder)
    if ckpt.quant.method != "modelopt":
        raise UnsupportedFormatError(
            f"the student {folder} is {ckpt.quant.method}; expected ModelOpt's layout, as `nvfp4 quantize` writes it"
        )
    model = load_plain(teacher_folder, dtype, device)
    weights = nvfp4_weights(model, ckpt)
    plain = dict(plain_tensors(folder, weights))
    _check_names(model, plain, weights, folder)
    teacher = {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}
    norms = {name.removesuffix(".weight"): t for name, t in plain.items() if t.dim() == 1}
    heads = int(getattr(model.config, "num_attention_heads", 1))
    start = starting_weights(weights, teacher, norms, heads)
    logger.info(
        "%d NVFP4 layers: %d start from the teacher's weights, %d from their codes",
        len(weights),
        start.recovered,
        len(weights) - start.recovered,
    )
    layers = swap(model, weights, start.weights, numerics, dtype, block_scales, device, scales=train == "scales")
    student = Student(model, folder, layers)
    _load_plain_parameters(student, plain, train)
    for name, layer in layers.items():
        student.masters[f"{name}.{'weight' if layer.steps is None else 'steps'}"] = layer.master
        gather(layer.linear.weight, layer.master, layer.to_master)
    for name, parameter in student.plain.items():
        gather(parameter, student.masters[name])
    student.refresh()
    return student


def nvfp4_weights(model: nn.Module, ckpt: Checkpoint, prefix: str = "") -> dict[str, NVFP4Weight]:
    """The NVFP4 layers whose names begin with `prefix`, each an nn.Linear of `model`."""
    found = dict[str, NVFP4Weight]()
    stored = {name.removesuffix(".weight_scale_2") for name in ckpt.names() if name.endswith(".weight_scale_2")}
    for name in sorted(name for name in stored if name.startswith(prefix)):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise UnsupportedFormatError(
                f"the student's layer {name} is {type(module).__name__ if module else 'no module'} in transformers' "
                "model, expected nn.Linear: such a family (fused experts) cannot be distilled here yet"
            )
        weight = ckpt.linear(name, module.out_features, module.in_features)
        if not isinstance(weight, NVFP4Weight) or weight.pre_quant_scale is not None:
            raise UnsupportedFormatError(f"the student's layer {name} is not plain NVFP4; it cannot be trained here")
        found[name] = weight
    if not found:
        raise UnsupportedFormatError(f"{ckpt.path} has no NVFP4 layer; give one that `nvfp4 quantize` made")
    return found


def plain_tensors(folder: Path, layers: dict[str, NVFP4Weight]) -> Iterator[tuple[str, Tensor]]:
    shards = Shards(folder)
    for info in shards:
        if info.name.rsplit(".", 1)[0] not in layers and info.dtype in ("BF16", "F16", "F32"):
            yield info.name, shards.read(info.name)


def _check_names(model: Any, plain: Mapping[str, Tensor], layers: Mapping[str, NVFP4Weight], folder: Path) -> None:
    """The student has the teacher's tensors, in their shapes, and no others. Raises what CheckpointErrors say so."""
    wanted = {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[0] not in layers}
    if missing := sorted(wanted.keys() - plain.keys()):
        raise MissingTensorError(missing[0], str(folder), "the teacher has it: quantise the teacher again")
    for name, parameter in wanted.items():
        if parameter.shape != plain[name].shape:
            raise TensorShapeError(name, str(folder), str(list(parameter.shape)), str(list(plain[name].shape)))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if surplus := sorted(plain.keys() - tied - {name for name, _ in model.named_buffers()}):
        raise UnexpectedTensorError(surplus, str(folder))


def swap(
    model: nn.Module,
    weights: dict[str, NVFP4Weight],
    masters: dict[str, Tensor],
    numerics: Numerics,
    dtype: torch.dtype,
    policy: BlockScales,
    device: torch.device,
    scales: bool = False,
) -> dict[str, Layer]:
    """Put a FakeQuantLinear in the place of each nn.Linear in `weights`; `scales`: their block scales learn."""
    layers, sites = dict[str, Layer](), dict[str, Site]()
    if numerics == "w4a4" and (missing := [name for name, w in weights.items() if w.input_scale is None]):
        raise ConfigError(
            f"{len(missing)} layer(s) of the student have no input_scale, e.g. {missing[0]}: W4A4 needs them; quantise "
            "with --calib, or distil with --act w4a16",
            "--act",
        )
    for name, weight in weights.items():
        key = site_of(name)
        if key not in sites:
            readers = [other for other in weights if site_of(other) == key]
            scale = None
            if numerics == "w4a4":
                largest = max(float(weights[reader].input_scale or 0.0) for reader in readers)
                scale = torch.tensor(largest, dtype=torch.float32, device=device)
            sites[key] = Site(scale, len(readers))
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)  # nvfp4_weights looked
        bias = None if weight.bias is None else weight.bias.to(dtype=dtype, device=device)
        linear = FakeQuantLinear(
            torch.empty(weight.n, weight.k, dtype=dtype, device=device),
            bias,
            float(weight.weight_scale_2[0]),
            sites[key],
        )
        model.set_submodule(name, linear)
        start = masters[name].to(device=device, dtype=torch.float32).clone()
        block_scale, scale_2 = weight.block_scale.to(device), weight.weight_scale_2[0].to(device)
        steps = block_scale.to(torch.float32) * scale_2 if scales else None
        layers[name] = Layer(linear, start, block_scale, scale_2, policy, steps)
    return layers


def site_of(module: str) -> str:
    """What modules with one input have in common: "model.layers.3.qkv". Others are sites of their own."""
    for site, names in SITE_MODULES.items():
        for name in names:
            if module.endswith(f".{name}"):
                return f"{module.removesuffix(name)}{site}"
    return module


def _load_plain_parameters(student: Student, stored: dict[str, Tensor], train: Train) -> None:
    """The student's own norms, embedding, head and biases; those that are trained get a master."""
    parameters: dict[str, Any] = dict(student.model.named_parameters())
    outside = {id(m.weight) for m in _embeddings(student.model)}
    for name, tensor in stored.items():
        parameter = parameters.get(name)
        if parameter is None:  # tied to another, or a buffer
            continue
        with torch.no_grad():
            parameter.copy_(tensor)
        if train == "scales" or (train == "layers" and id(parameter) in outside):
            continue
        student.plain[name], student.dtypes[name] = parameter, tensor.dtype
        student.masters[name] = tensor.to(device=parameter.device, dtype=torch.float32).clone()


def _embeddings(model: Any) -> list[Any]:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in found if module is not None]


def gather(parameter: Tensor, master: Tensor, to_master: Callable[[Tensor], Tensor] | None = None) -> None:
    """Let gradients of `parameter` be added to the master's in float32, and vanish."""
    master.grad = torch.zeros_like(master)

    def move(_: Tensor) -> None:
        assert parameter.grad is not None
        assert master.grad is not None
        master.grad.add_(parameter.grad if to_master is None else to_master(parameter.grad))
        parameter.grad = None

    parameter.requires_grad_(True)
    parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
