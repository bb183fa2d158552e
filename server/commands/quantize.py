"""`nvfp4 quantize SRC OUT`."""

from __future__ import annotations

import argparse
from typing import Any

from nvfp4_runtime.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("quantize", help="write a plain model folder as a ModelOpt NVFP4 folder")
    parser.add_argument("src", metavar="SRC", help="BF16, FP16 or FP32 Hugging Face folder")
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist")
    parser.add_argument("--method", default="max", help="how block scales are chosen (default: %(default)s)")
    parser.add_argument("--calib", metavar="FILE", help="text to measure activations on; gives W4A4 input scales")
    parser.add_argument("--fp8-kv", action="store_true", help="also measure FP8 scales for the KV cache")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules plain; may repeat"
    )
    parser.set_defaults(run=run, log_level="info")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    texts = None
    if args.calib is not None:
        try:
            texts = [Path(args.calib).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the calibration text {args.calib} cannot be read: {error}", "--calib") from error
    from nvfp4_runtime.quantize.pipeline import quantize_folder

    report = quantize_folder(
        args.src, args.out, method=args.method, calib_texts=texts, fp8_kv=args.fp8_kv, exclude=args.exclude
    )
    kv = f", {report.kv_algo} KV cache" if report.kv_algo else ""
    print(
        f"{args.out}: {report.algo}{kv}; {report.num_quantized} layers quantised, {report.num_plain} tensors plain; "
        f"{report.source_bytes / 1e6:.1f} MB -> {report.out_bytes / 1e6:.1f} MB"
    )
    for note in report.notes:
        print(f"  {note}")
    return 0
