"""The trained student as the folder it came from, with other values: the same tensors, types, scales and configs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT
from nvfp4_runtime.checkpoint.shards import DTYPES, Shards
from nvfp4_runtime.checkpoint.writer import ShardWriter, TensorSpec, naming, new_folder
from nvfp4_runtime.distill.student import Student
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.quantize.export import copy_companions

Rounding = tuple[Tensor, Tensor, Tensor]  # weights fp32 [N, K], block_scale e4m3 [N, K/16], scale_2 fp32 []


def export_student(student: Student, out: Path) -> None:
    """Write `student` as its masters are now. `out` appears whole or not at all."""
    student.refresh()  # block scales may be recomputed
    parts = {name: (layer.weights.detach(), layer.block_scale, layer.scale_2) for name, layer in student.layers.items()}
    export(student.folder, parts, {name: student.masters[name].detach() for name in student.plain}, out)


def export(folder: Path, layers: Mapping[str, Rounding], plain: Mapping[str, Tensor], out: Path) -> None:
    """`folder` with other values: `layers` by module, rounded under their scales; `plain` tensors by name.

    Names, types, tensor scales, configs and companions stay. Both mappings are read a tensor at a time.
    """
    shards = Shards(folder)
    with new_folder(out) as temporary:
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in shards]
        with ShardWriter(temporary, specs) as writer:
            for spec in specs:
                writer.write(spec.name, _value(layers, plain, shards, spec))
        for name in (CONFIG, HF_QUANT):
            if (folder / name).is_file():
                with naming(temporary / name):
                    shutil.copyfile(folder / name, temporary / name)
        copy_companions(folder, temporary)
    shards.close()


def _value(layers: Mapping[str, Rounding], plain: Mapping[str, Tensor], shards: Shards, spec: TensorSpec) -> Tensor:
    module, _, kind = spec.name.rpartition(".")
    if module in layers:
        weights, block_scale, scale_2 = layers[module]
        if kind == "weight":
            blocks = weights.reshape(weights.shape[0], -1, codec.BLOCK)
            return codec.encode_blocks(blocks, block_scale, scale_2).cpu()
        if kind == "weight_scale":
            return block_scale.cpu()
    if spec.name in plain:
        return plain[spec.name].to(DTYPES[spec.dtype]).cpu()
    return shards.read(spec.name, dtypes=tuple(DTYPES))
