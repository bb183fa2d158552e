"""GPUs as their data sheets have them. Nothing here was measured by us: plans made from it say so.

Dense figures without sparsity, of the SXM forms where there are several.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """TFLOP/s dense by the type of both operands; fp4 None: its tensor cores have no FP4.

    link_bytes_per_second     between two of them, one way: NVLink, or PCIe where they have none
    flops_share, bytes_share  assumed to be reached in practice, the latter of links too
    step_overhead_seconds     assumed per step: scheduling, launches, sampling, the way back
    exchange_seconds          assumed for a sum over ranks, beside what its bytes take
    eager_layer_seconds       assumed per layer of ranks, whose steps are launched op by op and not captured as graphs
    """

    name: str
    memory_bytes: float
    bytes_per_second: float
    bf16: float
    fp4: float | None
    link_bytes_per_second: float
    flops_share: float = 0.6
    bytes_share: float = 0.75
    step_overhead_seconds: float = 0.0015
    exchange_seconds: float = 20e-6
    eager_layer_seconds: float = 100e-6

    def peak_flops(self, numerics: str) -> float:
        """W4A16 and plain weights multiply in BF16 everywhere; so does W4A4 where there is no FP4."""
        if numerics == "w4a4" and self.fp4 is not None:
            return self.fp4 * 1e12
        return self.bf16 * 1e12


GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, 2.04e12, 312, None, 300e9),
    "l40s": Gpu("L40S", 48e9, 0.864e12, 362, None, 32e9),
    "h100": Gpu("H100 SXM", 80e9, 3.35e12, 989, None, 450e9),
    "h200": Gpu("H200", 141e9, 4.8e12, 989, None, 450e9),
    "b200": Gpu("B200", 180e9, 7.7e12, 2250, 9000, 900e9),
    "rtx-pro-6000": Gpu("RTX PRO 6000 Blackwell", 96e9, 1.79e12, 504, 2015, 64e9),
}


def find_gpu(name: str) -> Gpu:
    """ValueError lists what there is."""
    if name not in GPUS:
        raise ValueError(
            f"unknown GPU {name!r}; expected {', '.join(GPUS)}, or a file of `python -m loadtest calibrate`"
        )
    return GPUS[name]
