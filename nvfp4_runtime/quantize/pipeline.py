"""`nvfp4 quantize` in one call: find the source, calibrate if there is a text, then quantise."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES, check_place, new_folder, temporary_prefix
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.nvfp4.block_scales import BLOCK_METHODS, BlockMethod
from nvfp4_runtime.quantize.plan import Plan, make_plan
from nvfp4_runtime.quantize.ptq import QuantizeReport, Source, quantize_checkpoint
from nvfp4_runtime.quantize.recipes import CALIBRATED_METHODS

logger = logging.getLogger(__name__)

CALIB_WINDOWS = 128
DEFAULT_NAMES = ("default", "default-bf16")  # one and the same: only the plain parent can be quantised
METHODS = (*BLOCK_METHODS, *CALIBRATED_METHODS)


def quantize_folder(
    src: str | Path,
    out: str | Path,
    *,
    method: str = "mse",
    calib_texts: Sequence[str] | None = None,
    fp8_kv: bool = False,
    exclude: Sequence[str] = (),
    fp8: Sequence[str] = (),
    bits_budget: float | None = None,
    calib_windows: int | None = None,
    numerics: Numerics | None = None,
    backend: str = "auto",
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Quantise the plain model folder `src` into `out`.

    With `calib_texts` the result is NVFP4: it has an input_scale per layer and serves as W4A4 or W4A16, and with
    `fp8_kv` also FP8 KV scales. Without, it is W4A16_NVFP4, because an input_scale cannot be guessed.
    src  a folder, a .gguf file, or "default" ("default-bf16") for the embedded default model's BF16 parent; the last
         two are converted to BF16 first
    fp8  fnmatch patterns of modules to store as FP8; needs `calib_texts`, since ModelOpt's FP8 has an input_scale
    bits_budget    bits per quantised weight: the layers that cost most KL become FP8 or stay plain
    calib_windows  windows of 512 tokens that gptq and awq use at most (128); input scales alone are measured on all
    numerics       what gptq and awq compensate for: "w4a16" (default) weights alone, "w4a4" quantised activations too

    Raises ConfigError, CheckpointError.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}", "--method")
    if calib_texts is None and method in CALIBRATED_METHODS:
        raise ConfigError(f"method {method} needs a calibration text", "--calib")
    if calib_texts is None and fp8_kv:
        raise ConfigError("FP8 KV scales are measured, which needs a calibration text", "--calib")
    if bits_budget is not None and (calib_texts is None or fp8):
        raise ConfigError(
            "a bits budget measures layers on a calibration text and chooses FP8 itself: give --calib and no --fp8",
            "--bits-budget",
        )
    if calib_windows is not None and calib_windows < 1:
        raise ConfigError(f"at least 1 window is needed, found {calib_windows}", "--calib-windows")
    for flag, value in (("--calib-windows", calib_windows), ("--numerics", numerics)):
        if value is not None and method not in CALIBRATED_METHODS:
            raise ConfigError(
                f"{flag} is for the methods {', '.join(CALIBRATED_METHODS)}; {method} has no use for it: leave it out",
                flag,
            )
    if bits_budget is not None:
        from nvfp4_runtime.quantize.sensitivity import check_budget

        check_budget(bits_budget)
    if calib_texts is None and fp8:
        raise ConfigError("FP8 layers have a measured input_scale, which needs a calibration text", "--calib")
    # Before any work, as nothing that is wrong here gets right by computing
    out = check_place(Path(out), None if str(src) in DEFAULT_NAMES else Path(src))
    with plain_source(src, out, progress) as folder:
        if calib_texts is not None:
            from nvfp4_runtime.quantize.calibrate import check_text

            check_text(folder, calib_texts, calib_windows)
        plan = None
        if bits_budget is not None:
            plan = budget_plan(folder, calib_texts, exclude, bits_budget, backend=backend, progress=progress)
        if calib_texts is not None and method in CALIBRATED_METHODS:
            from nvfp4_runtime.quantize.calibrated import Options, quantize_calibrated  # loads models and kernels

            return quantize_calibrated(
                folder,
                out,
                calib_texts,
                Options(method, numerics=numerics or "w4a16"),
                fp8_kv=fp8_kv,
                exclude=exclude,
                fp8=fp8,
                plan=plan,
                max_windows=calib_windows or CALIB_WINDOWS,
                backend=backend,
                progress=progress,
                max_shard_bytes=max_shard_bytes,
            )
        measured = None
        if calib_texts is None:
            logger.info("no calibration text: writing W4A16_NVFP4 (weights only); give one for NVFP4 with W4A4")
        else:
            from nvfp4_runtime.quantize.calibrate import calibrate

            measured = calibrate(folder, calib_texts, backend=backend, progress=progress)
            logger.info("calibrated on %d tokens", measured.num_tokens)
        return quantize_checkpoint(
            folder,
            out,
            method=cast(BlockMethod, method),
            input_scales=None if measured is None else measured.input_scales,
            kv_scales=measured.kv_scales if measured is not None and fp8_kv else None,
            exclude=exclude,
            fp8=fp8,
            plan=plan,
            backend=backend,
            progress=progress,
            max_shard_bytes=max_shard_bytes,
        )


def budget_plan(
    folder: Path, texts: Sequence[str] | None, exclude: Sequence[str], budget: float, *, backend: str, progress: bool
) -> Plan:
    """The plan that spends `budget` bits per weight where they save most KL (sensitivity.py)."""
    from nvfp4_runtime.quantize.sensitivity import measure, spend

    assert texts is not None  # quantize_folder refused it
    source = Source.open(folder)
    plan = make_plan(source.shards, source.raw_config, exclude)
    chosen = spend(plan, measure(folder, texts, plan, backend=backend, progress=progress), budget)
    counts = Counter(chosen.values())
    logger.info(
        "of %d groups, %d are NVFP4, %d FP8 and %d plain", len(chosen), counts["nvfp4"], counts["fp8"], counts[None]
    )
    return make_plan(source.shards, source.raw_config, exclude, chosen=chosen)


@contextmanager
def plain_source(src: str | Path, out: Path, progress: bool) -> Iterator[Path]:
    """`src` as a plain Hugging Face folder. A .gguf file is converted beside `out`, for as long as it takes.

    What is converted stays after an interruption, as the partial result does, so that the next run can go on.
    """
    if str(src) in DEFAULT_NAMES:
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
