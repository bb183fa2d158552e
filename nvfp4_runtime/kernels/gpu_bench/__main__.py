"""Measure one part of the GPU's kernels: `python -m nvfp4_runtime.kernels.gpu_bench PART`, one JSON line per finding.

    rcp         the reciprocal instruction, bit by bit
    limits      bandwidth, BF16 rate, launch gap
    check       every kernel against the reference
    linear      NVFP4 linears beside cuBLAS, cold
    attention   paged decode attention

`make bench-gpu` runs them all, each in a process of its own: a fault on the device ends its process and no other.
--rehearse runs the same code at tiny sizes on the CPU (start it with TRITON_INTERPRET=1); its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from nvfp4_runtime.kernels.gpu_bench import attention, check, limits, linear, reciprocals
from nvfp4_runtime.kernels.gpu_bench.setting import Setting

PARTS = ("rcp", "limits", "check", "linear", "attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing per case")
    parser.add_argument("--dump", type=Path, help="rcp: where the differences of all mantissas go, one byte each")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA device: PyTorch sees none (--rehearse runs without one)", file=sys.stderr)
        return 2
    setting = Setting("cpu" if args.rehearse else "cuda", args.seconds)
    with torch.inference_mode():
        if args.part == "rcp":
            reciprocals.measure(setting, args.dump)
        else:
            {
                "limits": limits.measure,
                "check": check.measure,
                "linear": linear.measure,
                "attention": attention.measure,
            }[args.part](setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
