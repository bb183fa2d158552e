"""`nvfp4 quantize` in one call: calibrate if there is a text, then quantise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize.ptq import METHODS, QuantizeReport, quantize_checkpoint

logger = logging.getLogger(__name__)

__all__ = ["METHODS", "quantize_folder"]


def quantize_folder(
    src: str | Path,
    out: str | Path,
    *,
    method: str = "max",
    calib_texts: Sequence[str] | None = None,
    fp8_kv: bool = False,
    exclude: Sequence[str] = (),
    backend: str = "auto",
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Quantise the plain model folder `src` into `out`.

    With `calib_texts` the result is NVFP4: it has an input_scale per layer and serves as W4A4 or W4A16, and with
    `fp8_kv` also FP8 KV scales. Without, it is W4A16_NVFP4, because an input_scale cannot be guessed.
    Raises ConfigError, CheckpointError.
    """
    if calib_texts is None:
        if fp8_kv:
            raise ConfigError("FP8 KV scales are measured, which needs a calibration text", "--calib")
        logger.info("no calibration text: writing W4A16_NVFP4 (weights only); give one for NVFP4 with W4A4")
        return quantize_checkpoint(
            src, out, method=method, exclude=exclude, progress=progress, max_shard_bytes=max_shard_bytes
        )
    from nvfp4_runtime.quantize.calibrate import calibrate  # loads models and kernels

    measured = calibrate(src, calib_texts, backend=backend, progress=progress)
    logger.info("calibrated on %d tokens", measured.num_tokens)
    return quantize_checkpoint(
        src,
        out,
        method=method,
        input_scales=measured.input_scales,
        kv_scales=measured.kv_scales if fp8_kv else None,
        exclude=exclude,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )
