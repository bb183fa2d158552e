"""Calibration: the largest magnitude each linear layer's input takes over a text, and each layer's keys and values.

The plain model runs through our own layers and kernels, a layer at a time (layerwise.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4.codec import E4M3_MAX, SCALE_2_DENOMINATOR
from nvfp4_runtime.quantize.layerwise import (
    SITES,
    WINDOW,
    Input,
    LayerRun,
    Overlay,
    Walk,
    largest_input,
    windows,
)

logger = logging.getLogger(__name__)

LEAST_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """Scales measured over `num_tokens` tokens.

    input_scales  module -> amax / 2688 of its input; 1 where that was zero over the whole text
    kv_scales     attention module -> (k_scale, v_scale), amax / 448, keys after rope as they are cached
    unreached     experts that no token was sent to: they have the largest scale of their layer
    """

    input_scales: dict[str, float]
    kv_scales: dict[str, tuple[float, float]]
    num_tokens: int
    unreached: int = 0


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
    unreached = 0
    for layer_id in tqdm(range(walk.config.num_layers), desc="calibrate", unit="layer", disable=not progress):
        run = LayerRun(walk, layer_id)
        for site in SITES:
            run.to(site)
            largest, missed = largest_inputs(run.inputs(site))
            unreached += missed if site == "down" else 0
            for modules, amax in largest.items():
                input_scales |= dict.fromkeys(modules, input_scale_of(amax, modules))
        run.end()
        kv_scales[f"model.layers.{layer_id}.self_attn"] = cache_scales(run.kv_amax)
    if unreached:
        report_unreached(unreached)
    return Calibration(input_scales, kv_scales, walk.num_tokens, unreached)


def largest_inputs(inputs: Sequence[Input]) -> tuple[dict[tuple[str, ...], float], int]:
    """The largest magnitude that each reader reads, and how many read nothing: these get the largest of all.

    Raises CheckpointError where one is not finite.
    """
    found: dict[tuple[str, ...], float | None] = {}
    for each in inputs:
        rows = each.take()
        found[each.modules] = largest_input(rows, each.modules) if rows else None
    most = max((amax for amax in found.values() if amax is not None), default=0.0)
    missed = sum(amax is None for amax in found.values())
    return {modules: most if amax is None else amax for modules, amax in found.items()}, missed


def report_unreached(count: int) -> None:
    logger.warning(
        "%d expert(s) were sent no token of the calibration text: they have the largest input scale of their layer; "
        "a longer or more varied text reaches more",
        count,
    )


def input_scale_of(amax: float, modules: Sequence[str]) -> float:
    """amax / 2688; 1 for an input that was zero over the whole text, as behind a pruned layer.

    Every scale is right for zeros. With 1 the block scales alone carry whatever another text may bring, up to 2688.
    """
    if amax == 0:
        logger.warning("the input of %s is zero over the whole text; its input scale is set to 1", ", ".join(modules))
        return 1.0
    return amax / SCALE_2_DENOMINATOR


def cache_scales(amax: tuple[float, float]) -> tuple[float, float]:
    """(k_scale, v_scale) of an FP8 cache; 1 where nothing was ever stored."""
    k, v = amax
    return k / E4M3_MAX or 1.0, v / E4M3_MAX or 1.0


def tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, all of them, by the folder's tokenizer.json.

    The file may ask for truncation and padding, which are meant for batches of a model's users: neither applies here.
    Raises CheckpointError when there is no readable tokenizer.json.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, which calibration needs")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{path} is not a readable tokenizer, which calibration needs: {error}; fetch the file again, or leave "
            "--calib out"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts if text]


def check_text(folder: Path, texts: Sequence[str], wanted_windows: int | None = None) -> None:
    """Raise ConfigError when `texts` hold too little to measure anything on; warn when it is less than a window.

    wanted_windows  what the caller asked for; a text that has fewer is used as it is, with a warning
    """
    found = windows(tokenize(folder, texts))
    num_tokens = sum(map(len, found))
    if num_tokens < LEAST_TOKENS or not any(text.strip() for text in texts):
        blank = " and only white space" if num_tokens >= LEAST_TOKENS else ""
        raise ConfigError(
            f"the calibration text has {num_tokens} token(s){blank}; expected at least {LEAST_TOKENS} of what the "
            f"model will read in use, better a hundred windows of {WINDOW}: give a longer text",
            "--calib",
        )
    if num_tokens < WINDOW:
        logger.warning(
            "the calibration text has %d tokens, less than a window of %d: what is measured on it says little",
            num_tokens,
            WINDOW,
        )
    if wanted_windows is not None and len(found) < wanted_windows:
        logger.warning(
            "the calibration text has %d window(s) of %d tokens, fewer than the %d asked for (--calib-windows)",
            len(found),
            WINDOW,
            wanted_windows,
        )
