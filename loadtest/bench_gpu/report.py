"""One line for a person per finding."""

from __future__ import annotations

from typing import Any

# fields that name a case, in the order they are shown; everything else is its figure
_LABELS = ("name", "shape", "backend", "weights", "numerics", "kv_dtype", "batch", "context", "m")


def describe(row: dict[str, Any]) -> str:
    """A finding's case and its figures, with units people use."""
    label = " ".join(_label(key, row[key]) for key in _LABELS if key in row)
    figures = [_figure(key, value) for key, value in row.items() if key not in (*_LABELS, "part", "n", "k")]
    return f"{label:60} {'  '.join(figures)}"


def _label(key: str, value: Any) -> str:
    if key == "m":
        return f"M={value}"
    return f"{key} {value:g}" if key in ("batch", "context") else str(value)


def _figure(key: str, value: Any) -> str:
    if key == "seconds":
        return f"{value * 1e6:10.1f} us" if value < 0.1 else f"{value:10.2f} s"
    if key == "bytes_per_second":
        return f"{value / 1e9:8.0f} GB/s"
    if key == "operations_per_second":
        return f"{value / 1e12:8.2f} TFLOP/s"
    if key == "rate":
        return f"{value:.0f} tokens/s"
    if key == "ok":
        return "ok" if value else "WRONG"
    if isinstance(value, float):
        return f"{key} {value:.4g}"
    return f"{key}: {value}"
