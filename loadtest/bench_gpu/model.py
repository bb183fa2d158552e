"""A synthetic Llama-3.1-8B as ModelOpt NVFP4 and its BF16 twin, written tensor by tensor: never more than one is held.

The twin holds the same values: scales of tensors are powers of two, so code x block scale x tensor scale is exact in
BF16. Weights are drawn on the device that is measured, where there is one: 16 GB take seconds there.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loadtest.bench_cpu.checkpoints import INPUT_SCALE, Stored, write_configs, write_safetensors, write_words
from loadtest.bench_cpu.shapes import Shape
from loadtest.bench_cpu.weights import E2M1, E4M3, HIGHEST_SCALE, LOWEST_SCALE

LLAMA_8B = Shape("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, vocab=128256)
TINY = Shape("tiny", 64, 2, 4, 2, 32, 128, vocab=512, max_positions=256)


def ensure(shape: Shape, scratch: Path, quantised: bool, device: torch.device, seed: int = 0) -> Path:
    """The shape's folder in `scratch`, written if it is not whole there: 6.1 or 16.1 GB for LLAMA_8B."""
    folder = scratch / f"{shape.name}-{'NVFP4' if quantised else 'BF16'}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", list(stored(shape, quantised, device, seed)))
        write_words(folder, shape.vocab)
        write_configs(folder, shape, quantised)  # last: it says the folder is whole
    return folder


def num_bytes(shape: Shape, quantised: bool) -> int:
    """Bytes of the weights `ensure` writes, near enough to ask whether the disk has room."""
    return int(shape.num_linear * (0.5625 if quantised else 2.0) + 2 * shape.num_head * 2)


def stored(shape: Shape, quantised: bool, device: torch.device, seed: int) -> Iterator[Stored]:
    """Every tensor, none of them made yet."""
    plain = ((shape.vocab, shape.hidden), 1.0), ((shape.vocab, shape.hidden), 2 * shape.hidden**-0.5)
    for i, (name, (size, std)) in enumerate(zip(("model.embed_tokens", "lm_head"), plain, strict=True)):
        yield Stored(f"{name}.weight", "BF16", size, partial(_normal, size, std, _generator(device, seed, 1, i)))
    norms = [f"{p}.{kind}" for p in shape.layer_prefixes() for kind in ("input_layernorm", "post_attention_layernorm")]
    for name in [*norms, "model.norm"]:
        ones = partial(torch.ones, shape.hidden, dtype=torch.bfloat16)
        yield Stored(f"{name}.weight", "BF16", (shape.hidden,), partial(_as_bytes, ones))
    for layer, prefix in enumerate(shape.layer_prefixes()):
        for i, (name, (n, k)) in enumerate(shape.linears().items()):
            module, draw = f"{prefix}.{name}", _Linear(n, k, device, (seed, 2, layer, i))
            if not quantised:
                yield Stored(f"{module}.weight", "BF16", (n, k), partial(_as_bytes, draw.values))
                continue
            yield Stored(f"{module}.weight", "U8", (n, k // 2), partial(_as_bytes, draw.codes))
            yield Stored(f"{module}.weight_scale", "F8_E4M3", (n, k // 16), partial(_as_bytes, draw.scales))
            yield Stored(f"{module}.weight_scale_2", "F32", (), partial(struct.pack, "<f", draw.scale_2))
            yield Stored(f"{module}.input_scale", "F32", (), partial(struct.pack, "<f", INPUT_SCALE))


class _Linear:
    """One linear, drawn anew whenever it is asked for, always the same on one kind of device."""

    def __init__(self, n: int, k: int, device: torch.device, key: tuple[int, ...]) -> None:
        self._n, self._k, self._device, self._key = n, k, device, key
        mean_square = float((E2M1**2).mean()) * float((E4M3[LOWEST_SCALE : HIGHEST_SCALE + 1] ** 2).mean())
        self.scale_2 = 2.0 ** round(math.log2(k**-0.5 / math.sqrt(mean_square)))

    def codes(self) -> Tensor:
        """uint8 [n, k/2]"""
        return self._bytes(0, 256, self._k // 2, 0)

    def scales(self) -> Tensor:
        """uint8 [n, k/16], E4M3"""
        return self._bytes(LOWEST_SCALE, HIGHEST_SCALE + 1, self._k // 16, 1)

    def values(self) -> Tensor:
        """bfloat16 [n, k], exactly what codes and scales stand for."""
        table = torch.from_numpy(E2M1).to(self._device)
        byte = torch.arange(256, device=self._device)
        pairs = torch.stack([table[byte & 15], table[byte >> 4]], dim=1).to(torch.bfloat16)  # [256, 2]
        step = self.scales().view(torch.float8_e4m3fn).to(torch.bfloat16) * self.scale_2
        blocks = pairs[self.codes().to(torch.int32)].view(self._n, self._k // 16, 16)
        return (blocks * step.unsqueeze(-1)).view(self._n, self._k)

    def _bytes(self, low: int, high: int, width: int, which: int) -> Tensor:
        g = _generator(self._device, *self._key, which)()
        return torch.randint(low, high, (self._n, width), generator=g, dtype=torch.uint8, device=self._device)


def _generator(device: torch.device, *key: int) -> Callable[[], torch.Generator]:
    seed = 0
    for part in key:
        seed = seed * 1009 + part + 1
    return lambda: torch.Generator(device).manual_seed(seed)


def _normal(size: tuple[int, int], std: float, generator: Callable[[], torch.Generator]) -> bytes:
    g = generator()
    return _as_bytes(lambda: torch.randn(*size, generator=g, device=g.device, dtype=torch.float32).mul_(std).bfloat16())


def _as_bytes(make: Callable[[], Tensor]) -> bytes:
    return make().cpu().contiguous().view(torch.uint8).numpy().tobytes()
