"""Values of a config.json, taken out with a look at their type: whatever is wrong is named with field and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from nvfp4_runtime.config import Dtype
from nvfp4_runtime.errors import UnsupportedFormatError

Raw = Mapping[str, Any]

# Beyond any model there is, and small enough that nothing sized by them alone exhausts the memory: a config.json may
# claim anything, and its tensors are looked at later.
_LIMITS = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 100,
    "num_attention_heads": 65_536,
    "head_dim": 8_192,
    "num_experts": 65_536,
    "num_local_experts": 65_536,
    "n_routed_experts": 65_536,
}
LIMIT = 2**31 - 1


def count(raw: Raw, field: str, default: int | None = None) -> int:
    value = raw.get(field)
    value = default if value is None else value
    limit = _LIMITS.get(field, LIMIT)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise unsupported(field, value, f"a positive integer, at most {limit}")
    return value


def number(raw: Raw, field: str, default: float) -> float:
    value = raw.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LIMIT:  # NaN is neither
        raise unsupported(field, value, f"a number from 0 to {LIMIT}")
    return float(value)


def optional_number(raw: Raw, field: str) -> float | None:
    return None if raw.get(field) is None else number(raw, field, 0.0)


def token_ids(raw: Raw, field: str) -> tuple[int, ...]:
    """One id, several, or none."""
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i <= LIMIT for i in ids):
        raise unsupported(field, value, "a token id, a list of them, or null")
    return tuple(ids)


def flag(raw: Raw, field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise unsupported(field, value, "true or false")
    return bool(value)


def declared_dtype(raw: Raw) -> Dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise unsupported("dtype", name, "bfloat16, float16 or float32")
    return cast(Dtype, name)


def unsupported(field: str, found: object, expected: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"config.json: {field} is {_shown(found)}; expected {expected}")


def _shown(found: object) -> str:
    """A value for a message: a stranger's number may have more digits than Python cares to print."""
    if isinstance(found, int) and found.bit_length() > 128:
        return f"a number of {found.bit_length()} bits"
    text = repr(found)
    return text if len(text) <= 100 else f"{text[:100]}..."
