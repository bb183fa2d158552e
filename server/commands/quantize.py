"""`nvfp4 quantize SRC OUT`."""

from __future__ import annotations

import argparse
from typing import Any

from nvfp4_runtime.errors import ConfigError
from server.commands import flags

METHODS = ("max", "mse", "4over6", "awq", "gptq", "awq+gptq")  # quantize/pipeline.py's; a test compares
_ABOUT = """\
methods that need no text:
  max       block scales from each block's maximum, bit for bit as ModelOpt
  mse       block scales by search for the least squared error (the default)
  4over6    each block's maximum becomes 6 or 4, whichever errs less
with --calib:
  gptq      roundings compensated by the columns that follow; block scales by weighed search
  awq       inputs that matter more are scaled up, folded into what comes before
  awq+gptq  both

An interrupted run goes on where it was when the same command is given again."""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a plain model folder as a ModelOpt NVFP4 folder",
        epilog=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "src",
        type=flags.path,
        metavar="SRC",
        help="BF16, FP16 or FP32 Hugging Face folder, a .gguf file, or `default` (also `default-bf16`: the default "
        "model's plain parent)",
    )
    add("out", type=flags.path, metavar="OUT", help="folder to make; must not exist, or be empty")
    add("--method", choices=METHODS, default="mse", help="see below (default: %(default)s)")
    add("--calib", type=flags.path, metavar="FILE", help="text to measure activations on; gives W4A4 input scales")
    add("--calib-windows", type=int, metavar="N", help="windows of 512 tokens gptq and awq use at most (default: 128)")
    add(
        "--numerics",
        choices=("w4a16", "w4a4"),
        help="what gptq and awq compensate for: weights alone (w4a16, the default), or quantised activations as well",
    )
    add("--fp8-kv", action="store_true", help="also measure FP8 scales for the KV cache")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules plain; may repeat")
    add("--fp8", action="append", default=[], metavar="PATTERN", help="store these modules as FP8; may repeat")
    add(
        "--bits-budget",
        type=float,
        metavar="B",
        help="bits per weight: the most sensitive layers get FP8 or stay plain",
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
        args.src,
        args.out,
        method=args.method,
        calib_texts=texts,
        fp8_kv=args.fp8_kv,
        exclude=args.exclude,
        fp8=args.fp8,
        bits_budget=args.bits_budget,
        calib_windows=args.calib_windows,
        numerics=args.numerics,
    )
    kv = f", {report.kv_algo} KV cache" if report.kv_algo else ""
    print(
        f"{args.out}: {report.algo}{kv}; {report.num_quantized} layers quantised, {report.bits_per_weight:.2f} bits "
        f"per weight, {report.num_plain} tensors plain; "
        f"{report.source_bytes / 1e6:.1f} MB -> {report.out_bytes / 1e6:.1f} MB"
    )
    rate = report.num_weights / report.seconds / 1e6
    print(f"  {report.num_weights / 1e6:.1f} M weights in {report.seconds:.1f} s, {rate:.1f} M/s")
    for note in report.notes:
        print(f"  {note}")
    return 0
