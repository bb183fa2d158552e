"""The trained student as the folder it came from, with other values: the same tensors, types, scales and configs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT
from nvfp4_runtime.checkpoint.shards import DTYPES, Shards
from nvfp4_runtime.checkpoint.writer import ShardWriter, TensorSpec, naming, new_folder
from nvfp4_runtime.distill.student import Student
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.quantize.export import copy_companions


def export_student(student: Student, out: Path) -> None:
    """Write `student` as its masters are now. `out` appears whole or not at all."""
    student.refresh()  # block scales may be recomputed
    shards = Shards(student.folder)
    with new_folder(out) as folder:
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in shards]
        with ShardWriter(folder, specs) as writer:
            for spec in specs:
                writer.write(spec.name, _value(student, shards, spec))
        for name in (CONFIG, HF_QUANT):
            if (student.folder / name).is_file():
                with naming(folder / name):
                    shutil.copyfile(student.folder / name, folder / name)
        copy_companions(student.folder, folder)
    shards.close()


def _value(student: Student, shards: Shards, spec: TensorSpec) -> torch.Tensor:
    module, _, kind = spec.name.rpartition(".")
    if (layer := student.layers.get(module)) is not None:
        if kind == "weight":
            blocks = layer.master.detach().reshape(layer.master.shape[0], -1, codec.BLOCK)
            return codec.encode_blocks(blocks, layer.block_scale, layer.scale_2).cpu()
        if kind == "weight_scale":
            return layer.block_scale.cpu()
    if spec.name in student.plain:
        return student.masters[spec.name].detach().to(DTYPES[spec.dtype]).cpu()
    return shards.read(spec.name, dtypes=tuple(DTYPES))
