"""The figures to reach, each as a share of what the same GPU was measured to do. Nothing measured: "not measured"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.bench_cpu.shapes import BF16_BYTES, NVFP4_BYTES, Shape

Rows = list[dict[str, Any]]
KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}
GEMV_SHARE = {1: 0.75, 16: 0.65}
STEP_OVER_FLOOR = {1: 1.35, 64: 1.5, 256: 1.5}
STEP_UNDER_BF16 = 2.2
LARGE_M, LARGE_M_OVER_CUBLAS = 64, 0.5
PREFILL_SHARE = 0.70
ATTENTION_SHARE = 0.75


@dataclass(frozen=True)
class Target:
    """One line of the table. value: what was reached, in the unit of `wanted`, or None where nothing was measured."""

    name: str
    wanted: float
    at_least: bool
    value: float | None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value >= self.wanted if self.at_least else self.value <= self.wanted
        return "met" if met else "MISSED"

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:.2f}"
        sign = ">=" if self.at_least else "<="
        end = f"  {self.verdict}" if self.value is not None else ""
        return f"{self.name:58} {sign} {self.wanted:.2f}   {found:>12}{end}" + (
            f"  ({self.detail})" if self.detail else ""
        )


def targets(rows: Rows, shape: Shape, linear_shapes: tuple[str, ...]) -> list[Target]:
    limits = {r["name"]: r["value"] for r in rows if r["part"] == "limits" and "value" in r}
    return [
        *_linears(rows, limits, linear_shapes),
        *_decode(rows, limits, shape),
        _prefill(rows, limits, shape),
        *_attention(rows, limits),
    ]


def floor_seconds(limits: dict[str, float], shape: Shape, batch: int, context: float, kv_dtype: str) -> float | None:
    """The least time of a decode step of NVFP4 weights: all bytes at copy bandwidth, or all operations in BF16."""
    if not {"copy_bandwidth", "bf16_rate"} <= set(limits):
        return None
    num_bytes = shape.token_bytes(NVFP4_BYTES, BF16_BYTES) + batch * context * shape.kv_bytes(1, KV_BYTES[kv_dtype])
    attention = 4 * context * shape.layers * shape.heads * shape.head_dim  # scores and values, of one sequence
    operations = batch * (2 * (shape.num_linear + shape.num_head) + attention)
    return max(num_bytes / limits["copy_bandwidth"], operations / limits["bf16_rate"])


def _linears(rows: Rows, limits: dict[str, float], shapes: tuple[str, ...]) -> Iterator[Target]:
    def timed(backend: str, numerics: str, shape: str, m: int) -> dict[str, Any] | None:
        wanted = {"part": "linear", "backend": backend, "numerics": numerics, "shape": shape, "m": m}
        return _find(rows, wanted)

    bandwidth = limits.get("copy_bandwidth")
    for m, share in GEMV_SHARE.items():
        for shape in shapes:
            found, value, detail = timed("triton", "w4a16", shape, m), None, ""
            if found is not None and bandwidth:
                value = found["bytes_per_second"] / bandwidth
                detail = f"{found['seconds'] * 1e6:.1f} us"
            yield Target(f"W4A16 {shape} M={m}, share of copy bandwidth", share, True, value, detail)
    for shape in shapes:
        ours, cublas = timed("triton", "w4a16", shape, LARGE_M), timed("cublas", "bf16", shape, LARGE_M)
        value, detail = None, ""
        if ours is not None and cublas is not None:
            value = ours["seconds"] / cublas["seconds"]
            detail = f"{ours['seconds'] * 1e6:.1f} us, cuBLAS BF16 {cublas['seconds'] * 1e6:.1f} us"
        yield Target(f"W4A16 {shape} M={LARGE_M}, time over cuBLAS BF16", LARGE_M_OVER_CUBLAS, False, value, detail)


def _decode(rows: Rows, limits: dict[str, float], shape: Shape) -> Iterator[Target]:
    for batch, over in STEP_OVER_FLOOR.items():
        kv_dtypes = ("bfloat16", "fp8") if batch == 1 else ("fp8",)
        for kv_dtype in kv_dtypes:
            found = _find(rows, _decoding("w4a16", kv_dtype, batch))
            value, detail = None, ""
            if found is not None:
                floor = floor_seconds(limits, shape, batch, found["context"], kv_dtype)
                if floor is not None:
                    value = found["seconds"] / floor
                    detail = (
                        f"{found['seconds'] * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms, {found['rate']:.0f} tokens/s"
                    )
            name = f"decode step, batch {batch}, context 1k, {kv_dtype} KV, over the floor"
            yield Target(name, over, False, value, detail)
    ours, plain = _find(rows, _decoding("w4a16", "bfloat16", 1)), _find(rows, _decoding("bf16", "bfloat16", 1))
    value = plain["seconds"] / ours["seconds"] if ours is not None and plain is not None else None
    yield Target("decode step, batch 1, BF16 weights' time over ours", STEP_UNDER_BF16, True, value)


def _decoding(numerics: str, kv_dtype: str, batch: int) -> dict[str, Any]:
    return {"part": "end_to_end", "name": "decode", "numerics": numerics, "kv_dtype": kv_dtype, "batch": batch}


def _prefill(rows: Rows, limits: dict[str, float], shape: Shape) -> Target:
    wanted = {"part": "end_to_end", "name": "prefill", "numerics": "w4a16", "kv_dtype": "bfloat16"}
    found, value, detail = _find(rows, wanted), None, ""
    if found is not None and "bf16_rate" in limits:
        value = 2 * shape.num_linear * found["tokens"] / found["seconds"] / limits["bf16_rate"]
        detail = f"{found['seconds'] * 1e3:.1f} ms, {found['tokens'] / found['seconds']:.0f} tokens/s"
    return Target("prefill 2k, share of cuBLAS's BF16 rate", PREFILL_SHARE, True, value, detail)


def _attention(rows: Rows, limits: dict[str, float]) -> Iterator[Target]:
    for batch in (1, 64, 256):
        for context in (1024, 8192):
            for kv_dtype in KV_BYTES:
                wanted = {"part": "attention", "backend": "triton", "batch": batch, "context": context}
                found, value, detail = _find(rows, wanted | {"kv_dtype": kv_dtype}), None, ""
                if found is not None and "copy_bandwidth" in limits:
                    value = found["bytes_per_second"] / limits["copy_bandwidth"]
                    detail = f"{found['seconds'] * 1e6:.1f} us, {found['bytes_per_second'] / 1e9:.0f} GB/s"
                name = f"decode attention B={batch} at {context}, {kv_dtype} KV, of bandwidth"
                yield Target(name, ATTENTION_SHARE, True, value, detail)


def _find(rows: Rows, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The first timed finding with these fields."""
    return next((row for row in rows if "seconds" in row and wanted.items() <= row.items()), None)
