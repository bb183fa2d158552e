"""`nvfp4 inspect`: what is stored in a checkpoint, from its JSON files and headers alone. No weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nvfp4_runtime.checkpoint.detect import check_readable, detect, is_excluded, read_config
from nvfp4_runtime.checkpoint.shards import PLAIN, Shards, TensorInfo
from nvfp4_runtime.checkpoint.stored import FORMATS
from nvfp4_runtime.errors import UnsupportedFormatError

# Tensors that describe a weight rather than being one: counted as its bytes, not as parameters.
_COMPANIONS = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "weight_scale_inv",
    "pre_quant_scale",
    "weight_global_scale",
    "input_global_scale",
)
_KV_SCALES = ("k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class Group:
    """Modules that differ only in their layer numbers and are stored alike.

    name       module path, numbers as *
    stored     "nvfp4", "bf16", "fp8", ...; "incomplete nvfp4" when scales are missing
    shape      logical [out, in] of one module
    excluded   the declared exclusions cover it; None where nothing is declared quantised
    """

    name: str
    count: int
    stored: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    bits_per_weight: float
    excluded: bool | None
    input_scale: bool


@dataclass(frozen=True)
class Report:
    """What `inspect` found."""

    path: str
    architecture: str
    files: int
    method: str
    algo: str | None
    producer: str
    exclude: tuple[str, ...]
    groups: tuple[Group, ...]
    parameters: int
    bytes: int
    bytes_by_format: dict[str, int]
    ratio_to_bf16: float
    kv_dtype: str
    kv_bytes_per_token: int | None
    notes: tuple[str, ...]


@dataclass
class _Module:
    stored: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    input_scale: bool


def inspect(path: str | Path) -> Report:
    """Describe the checkpoint folder `path`, readable by this build or not.

    Raises CheckpointError when files are missing, truncated or contradict themselves.
    """
    folder = Path(path).expanduser()
    config = read_config(folder)
    quant = detect(folder, config)
    shards = Shards(folder)
    notes = [*quant.notes, *shards.notes]
    try:
        check_readable(quant, folder)
    except UnsupportedFormatError as error:
        notes.append(f"cannot be served: {error}")
    modules = _modules(shards)
    by_format: dict[str, int] = {}
    for module in modules.values():
        by_format[module.stored] = by_format.get(module.stored, 0) + module.nbytes
    total = sum(info.nbytes for info in shards)
    if other := total - sum(by_format.values()):
        by_format["scales of the KV cache and others"] = other
    declared = quant.algo is not None
    groups = _group(modules, quant.exclude if declared else None)
    notes += _disagreements(modules, quant.exclude, quant.algo)
    parameters = sum(module.parameters for module in modules.values())
    kv_dtype = "fp8" if quant.kv_algo == "FP8" else "bf16"
    return Report(
        path=str(folder),
        architecture=", ".join(map(str, config.get("architectures") or ["unknown"])),
        files=len({info.file for info in shards}),
        method=quant.method,
        algo=quant.algo,
        producer=quant.producer,
        exclude=quant.exclude,
        groups=groups,
        parameters=parameters,
        bytes=total,
        bytes_by_format=by_format,
        ratio_to_bf16=total / (2 * parameters) if parameters else 0.0,
        kv_dtype=kv_dtype,
        kv_bytes_per_token=_kv_bytes_per_token(config, kv_dtype),
        notes=tuple(notes),
    )


def render(report: Report) -> str:
    """The report as a table for a terminal."""
    quantised = f"{report.method} {report.algo or ''}".strip() + (f" by {report.producer}" if report.producer else "")
    lines = [
        f"{report.path}: {report.architecture}, {report.parameters:,} parameters in {report.files} file(s)",
        f"declared: {'not quantised' if report.method == 'none' else quantised}",
        "",
        f"{'layers':<44} {'count':>5} {'shape':>16} {'stored':<12} {'bits/weight':>11} {'MB':>9}  excluded",
    ]
    for g in report.groups:
        shape = "x".join(map(str, g.shape))
        excluded = {None: "-", True: "yes", False: "no"}[g.excluded]
        lines.append(
            f"{g.name:<44} {g.count:>5} {shape:>16} {g.stored:<12} {g.bits_per_weight:>11.3f} {g.bytes / 1e6:>9.2f}"
            f"  {excluded}" + ("" if g.input_scale or g.stored != "nvfp4" else "  (no input_scale: W4A16 only)")
        )
    formats = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sorted(report.bytes_by_format.items()))
    lines += ["", f"total {report.bytes / 1e6:.2f} MB ({formats}); {report.ratio_to_bf16:.3f} of BF16"]
    if report.kv_bytes_per_token is not None:
        lines.append(f"KV cache: {report.kv_dtype}, {report.kv_bytes_per_token:,} bytes per token")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _modules(shards: Shards) -> dict[str, _Module]:
    """Every weight-like tensor under its module's path; companions are added to their module's bytes."""
    modules: dict[str, _Module] = {}
    for info in shards:
        module, _, leaf = info.name.rpartition(".")
        if leaf in _COMPANIONS or leaf in _KV_SCALES:
            continue
        key = module if leaf in ("weight", "weight_packed") else info.name
        modules[key] = _describe(shards, info, module, leaf)
    return modules


def _describe(shards: Shards, info: TensorInfo, module: str, leaf: str) -> _Module:
    companions = [c for name in _COMPANIONS if (c := shards.info(f"{module}.{name}")) is not None]
    if leaf not in ("weight", "weight_packed"):
        companions = []
    nbytes = info.nbytes + sum(c.nbytes for c in companions)
    input_scale = any(c.name.endswith((".input_scale", ".input_global_scale")) for c in companions)
    shape, stored = info.shape, FORMATS.get(info.dtype, info.dtype.lower())
    if leaf == "weight_packed" and info.dtype == "U8":
        stored, shape = "ct 4-bit", (*shape[:-1], 2 * shape[-1])
    elif leaf == "weight" and info.dtype == "U8" and shape:
        complete = all(f"{module}.{name}" in shards for name in ("weight_scale", "weight_scale_2"))
        stored, shape = "nvfp4" if complete else "incomplete nvfp4", (*shape[:-1], 2 * shape[-1])
    parameters = 1
    for size in shape:
        parameters *= size
    return _Module(stored, shape, parameters, nbytes, input_scale)


class _Key(NamedTuple):
    name: str
    stored: str
    shape: tuple[int, ...]
    excluded: bool | None
    input_scale: bool


def _group(modules: dict[str, _Module], exclude: tuple[str, ...] | None) -> tuple[Group, ...]:
    groups: dict[_Key, list[_Module]] = {}
    for name, module in modules.items():
        if len(module.shape) >= 2:
            excluded = is_excluded(name, exclude) if exclude is not None else None
            path = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            key = _Key(path, module.stored, module.shape, excluded, module.input_scale)
        else:
            key = _Key("norms, biases and other vectors", module.stored, (), None, False)
        groups.setdefault(key, []).append(module)
    made = []
    for key, members in groups.items():
        parameters, nbytes = sum(m.parameters for m in members), sum(m.nbytes for m in members)
        made.append(
            Group(
                name=key.name,
                count=len(members),
                stored=key.stored,
                shape=key.shape,
                parameters=parameters,
                bytes=nbytes,
                bits_per_weight=8 * nbytes / parameters if parameters else 0.0,
                excluded=key.excluded,
                input_scale=key.input_scale,
            )
        )
    return tuple(sorted(made, key=lambda g: (not g.shape, g.name, g.stored)))


def _disagreements(modules: dict[str, _Module], exclude: tuple[str, ...], algo: str | None) -> list[str]:
    """Where declared exclusions and stored tensors contradict each other."""
    kinds: dict[str, list[str]] = {}
    for name, module in modules.items():
        packed = module.stored.endswith("nvfp4")
        if module.stored == "incomplete nvfp4":
            kinds.setdefault("are packed but lack weight_scale or weight_scale_2", []).append(name)
        if packed and algo is None:
            kinds.setdefault("are packed NVFP4 although no config declares it", []).append(name)
        elif packed and is_excluded(name, exclude):
            kinds.setdefault("are packed NVFP4 although the config excludes them", []).append(name)
        if packed and not module.input_scale and algo == "NVFP4":
            kinds.setdefault("have no input_scale although NVFP4 declares one (W4A4 is impossible)", []).append(name)
        plain_linear = len(module.shape) == 2 and name.endswith("_proj") and module.stored in _PLAIN_FORMATS
        if plain_linear and algo is not None and not is_excluded(name, exclude):
            kinds.setdefault(f"are plain although the config declares {algo} for them", []).append(name)
    return [f"{len(names)} layer(s) {what}, e.g. {names[0]}" for what, names in kinds.items()]


_PLAIN_FORMATS = tuple(FORMATS[dtype] for dtype in PLAIN)


def _kv_bytes_per_token(config: dict[str, Any], kv_dtype: str) -> int | None:
    """Bytes of K and V per token over all layers, or None for configs of other shapes of model."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    hidden = config.get("hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    if not all(type(v) is int and v > 0 for v in (layers, kv_heads, head_dim)):
        return None
    assert isinstance(layers, int)
    assert isinstance(kv_heads, int)
    assert isinstance(head_dim, int)
    return 2 * layers * kv_heads * head_dim * (1 if kv_dtype == "fp8" else 2)
