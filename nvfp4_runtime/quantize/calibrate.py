"""Calibration: the largest magnitude each linear layer's input takes over a text, and each layer's keys and values.

The plain model runs through our own layers and kernels, a layer at a time (layerwise.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nvfp4_runtime.errors import CheckpointError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4.codec import E4M3_MAX, SCALE_2_DENOMINATOR
from nvfp4_runtime.quantize.layerwise import SITES, LayerRun, Overlay, Walk, largest_input, site_modules, windows


@dataclass(frozen=True)
class Calibration:
    """Scales measured over `num_tokens` tokens.

    input_scales  module -> amax / 2688 of its input
    kv_scales     attention module -> (k_scale, v_scale), amax / 448, keys after rope as they are cached
    """

    input_scales: dict[str, float]
    kv_scales: dict[str, tuple[float, float]]
    num_tokens: int


def calibrate(folder: str | Path, texts: Sequence[str], *, backend: str = "auto", progress: bool = True) -> Calibration:
    """Run `texts` through the plain model in `folder` (BF16 activations) and measure.

    Each text is tokenised as it is, special tokens in it recognised, and cut into windows of 512 tokens.
    Raises ConfigError when the texts hold no token, CheckpointError when an activation is not finite.
    """
    walk = Walk(
        Overlay.over(folder),
        Kernels(available_backends(backend), "bfloat16"),
        windows(tokenize(Path(folder), texts)),
    )
    input_scales: dict[str, float] = {}
    kv_scales: dict[str, tuple[float, float]] = {}
    for layer_id in tqdm(range(walk.config.num_layers), desc="calibrate", unit="layer", disable=not progress):
        run = LayerRun(walk, layer_id)
        for site in SITES:
            modules = site_modules(layer_id, site)
            amax = largest_input(run.to(site), modules)
            input_scales |= dict.fromkeys(modules, amax / SCALE_2_DENOMINATOR)
        run.end()
        kv_scales[f"model.layers.{layer_id}.self_attn"] = cache_scales(run.kv_amax)
    return Calibration(input_scales, kv_scales, walk.num_tokens)


def cache_scales(amax: tuple[float, float]) -> tuple[float, float]:
    """(k_scale, v_scale) of an FP8 cache; 1 where nothing was ever stored."""
    k, v = amax
    return k / E4M3_MAX or 1.0, v / E4M3_MAX or 1.0


def tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, which calibration needs")
    tokenizer = Tokenizer.from_file(str(path))
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts if text]
