"""3.5 times smaller than FP16, 1.8 times than FP8: of quantised tensors, and of whole models."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.distill.reproduce.table import Row
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.default_model import default_bf16, ensure_default_model


@dataclass(frozen=True)
class Shape:
    """A Llama by its config: what is quantised is every linear of a block; embedding and head stay BF16."""

    name: str
    layers: int
    hidden: int
    inner: int
    kv: int  # rows of k_proj
    vocab: int

    @property
    def linear(self) -> int:
        return self.layers * (2 * self.hidden * self.hidden + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner)

    @property
    def plain(self) -> int:
        return 2 * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden


SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256),
)


def run() -> list[Row]:
    rows = [
        Row(
            "3.5x smaller than FP16, 1.8x than FP8",
            "bits of one quantised weight: 4 and an eighth of 4 for E4M3 scales, tensor scales left out",
            f"{16 / 4.5:.2f}x and {8 / 4.5:.2f}x",
            "reproduces",
        )
    ]
    for shape in SHAPES:
        nvfp4, fp8 = (shape.linear * bits / 8 + 2 * shape.plain for bits in (4.5, 8))
        fp16 = 2 * (shape.linear + shape.plain)
        rows.append(
            Row(
                "the same of a whole model",
                f"{shape.name}: bytes by its config, embedding and head BF16",
                f"{fp16 / nvfp4:.2f}x and {fp8 / nvfp4:.2f}x ({nvfp4 / 1e9:.2f} GB)",
                "in part",
            )
        )
    try:
        plain, packed = default_bf16(progress=False), ensure_default_model(progress=False)
    except ConfigError as error:
        return [*rows, Row("the same", "the default model", str(error), "cannot be measured here")]
    before, after = (sum(info.nbytes for info in Shards(folder)) for folder in (plain, packed))
    return [
        *rows,
        Row(
            "the same of a whole model",
            "SmolLM2-135M-Instruct, bytes of the tensors on disk; a fifth of it is the embedding, BF16",
            f"{before / after:.2f}x ({before / 1e6:.1f} -> {after / 1e6:.1f} MB)",
            "in part",
        ),
    ]
