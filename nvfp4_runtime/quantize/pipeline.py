"""`nvfp4 quantize` in one call: find the source, calibrate if there is a text, then quantise."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES, new_folder, temporary_prefix
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.nvfp4.block_scales import BLOCK_METHODS, BlockMethod
from nvfp4_runtime.quantize.ptq import QuantizeReport, quantize_checkpoint

logger = logging.getLogger(__name__)

METHODS = BLOCK_METHODS


def quantize_folder(
    src: str | Path,
    out: str | Path,
    *,
    method: BlockMethod = "mse",
    calib_texts: Sequence[str] | None = None,
    fp8_kv: bool = False,
    exclude: Sequence[str] = (),
    fp8: Sequence[str] = (),
    backend: str = "auto",
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Quantise the plain model folder `src` into `out`.

    With `calib_texts` the result is NVFP4: it has an input_scale per layer and serves as W4A4 or W4A16, and with
    `fp8_kv` also FP8 KV scales. Without, it is W4A16_NVFP4, because an input_scale cannot be guessed.
    src  a folder, a .gguf file, or "default" for the embedded default model; the last two are converted to BF16 first
    fp8  fnmatch patterns of modules to store as FP8; needs `calib_texts`, since ModelOpt's FP8 has an input_scale

    Raises ConfigError, CheckpointError.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}", "--method")
    if calib_texts is None and fp8_kv:
        raise ConfigError("FP8 KV scales are measured, which needs a calibration text", "--calib")
    if calib_texts is None and fp8:
        raise ConfigError("FP8 layers have a measured input_scale, which needs a calibration text", "--calib")
    out = Path(out)
    with plain_source(src, out, progress) as folder:
        if calib_texts is None:
            logger.info("no calibration text: writing W4A16_NVFP4 (weights only); give one for NVFP4 with W4A4")
            measured = None
        else:
            from nvfp4_runtime.quantize.calibrate import calibrate  # loads models and kernels

            measured = calibrate(folder, calib_texts, backend=backend, progress=progress)
            logger.info("calibrated on %d tokens", measured.num_tokens)
        return quantize_checkpoint(
            folder,
            out,
            method=method,
            input_scales=None if measured is None else measured.input_scales,
            kv_scales=measured.kv_scales if measured is not None and fp8_kv else None,
            exclude=exclude,
            fp8=fp8,
            backend=backend,
            progress=progress,
            max_shard_bytes=max_shard_bytes,
        )


@contextmanager
def plain_source(src: str | Path, out: Path, progress: bool) -> Iterator[Path]:
    """`src` as a plain Hugging Face folder. A .gguf file is converted beside `out`, for as long as it takes.

    What is converted stays after an interruption, as the partial result does, so that the next run can go on.
    """
    if str(src) == "default":
        from nvfp4_runtime.quantize.default_model import default_bf16

        yield default_bf16(progress)
        return
    src = Path(src)
    if src.suffix != ".gguf":
        yield src
        return
    if not src.is_file():
        raise ConfigError(f"{src} is not a file", "SRC")
    from nvfp4_runtime.checkpoint.gguf import convert_gguf  # imports gguf, which is slow

    stat = src.stat()
    folder = out.parent / f"{temporary_prefix(out)}bf16-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if not folder.exists():
        logger.info("converting %s to BF16", src)
        with new_folder(folder) as temporary:
            convert_gguf(src, temporary)
    yield folder
    shutil.rmtree(folder)
