"""`nvfp4 inspect`: one pass over a folder, every check, one Report. No GPU, and never more than a chunk in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nvfp4_runtime.checkpoint.detect import CONFIG, detect, read_config
from nvfp4_runtime.checkpoint.doctor import describe
from nvfp4_runtime.checkpoint.doctor.case import Case
from nvfp4_runtime.checkpoint.doctor.checks import complete, configs, groups, inputs, layout, parents, scales, tensors
from nvfp4_runtime.checkpoint.doctor.expected import Expect, Expected, nothing_expected
from nvfp4_runtime.checkpoint.doctor.files import LooseShards
from nvfp4_runtime.checkpoint.doctor.measure import is_plain, measure, work_bytes
from nvfp4_runtime.checkpoint.doctor.parent import sqnr_db
from nvfp4_runtime.checkpoint.doctor.report import SCHEMA, SEVERITIES, Finding, Parent, Report
from nvfp4_runtime.checkpoint.doctor.statistics import Advance
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import loose, modules
from nvfp4_runtime.errors import CheckpointError, UnsupportedFormatError

CHECKS: tuple[Callable[[Case], Iterable[Finding]], ...] = (
    configs.config_missing,
    configs.unsupported,
    complete.config_refused,
    configs.config_disagreement,
    configs.undeclared,
    configs.excluded_but_quantised,
    configs.declared_but_plain,
    configs.declared_otherwise,
    configs.patterns_unevaluated,
    tensors.unreadable,
    tensors.extra_values,
    tensors.decoder_layers,
    complete.missing,
    complete.shapes,
    complete.unexpected,
    tensors.orphans,
    tensors.loose_parameters,
    tensors.tied_head,
    layout.double_scales,
    layout.scales_halved,
    layout.scales_swizzled,
    layout.nibbles_swapped,
    scales.block_scale_nan,
    scales.block_scale_negative,
    scales.block_scale_zero,
    scales.tensor_scale_invalid,
    scales.tensor_scale_inverted,
    scales.fp8_invalid,
    scales.plain_nonfinite,
    scales.blocks_saturated,
    scales.all_zero,
    groups.experts_uninitialised,
    groups.experts_missing,
    groups.sibling_scales,
    groups.sibling_formats,
    groups.sibling_inputs,
    inputs.input_scale_invalid,
    inputs.input_scale_missing,
    inputs.input_scale_constant,
    inputs.input_scale_inverted,
    inputs.kv_scales,
    inputs.kv_undeclared,
    parents.nonfinite,
    parents.far_from_parent,
    parents.factors_folded,
    parents.not_in_parent,
    layout.unseen,
)

Progress = Callable[[str, int], Advance]


def no_progress(what: str, total: int) -> Advance:
    """Tells nobody."""
    return lambda _: None


def inspect(
    path: str | Path,
    parent: str | Path | None = None,
    memories: Iterable[int] = describe.MEMORIES,
    progress: Progress = no_progress,
    expect: Expect = nothing_expected,
) -> Report:
    """Examine the checkpoint folder `path`, and compare it with the plain model it was made of, `parent`.

    memories   sizes in bytes to say what fits into
    progress   progress(what, total bytes) gives a function that is told of every so many bytes more
    expect     tells from config.json what the model reads (models/expected.py); left out, layers are judged by others

    Raises CheckpointError when files are unreadable: missing, truncated, no JSON, or contradicting themselves.
    """
    began = time.monotonic()
    folder = Path(path).expanduser()
    case = examine(folder, open_parent(parent), progress, expect)
    return report(case, Path(parent).expanduser() if parent is not None else None, tuple(memories), began)


def open_parent(parent: str | Path | None) -> Shards | None:
    """The parent's tensors; CheckpointError when it is no plain model."""
    if parent is None:
        return None
    folder = Path(parent).expanduser()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist: there is no such folder"
        raise CheckpointError(f"--parent {parent} {what}; give the folder of the BF16, FP16 or FP32 model")
    shards = LooseShards(folder)
    if not any(is_plain(layer) and layer.k > 1 for layer in modules(shards)):
        raise CheckpointError(f"--parent {parent} holds no plain matrix; expected the BF16, FP16 or FP32 model")
    return shards


def examine(
    folder: Path, parent: Shards | None, progress: Progress = no_progress, expect: Expect = nothing_expected
) -> Case:
    """Open `folder`, and count everything in it."""
    config = _config(folder)
    quant = detect(folder, config)
    shards = LooseShards(folder)
    layers = list(modules(shards))
    wanted, refusal = _expected(config, expect, {layer.prefix for layer in layers})
    advance = progress("reading", work_bytes(layers, parent))
    return Case(
        folder=folder,
        config=config,
        quant=quant,
        shards=shards,
        layers=measure(shards, layers, parent, advance),
        loose=list(loose(shards)),
        has_parent=parent is not None,
        expected=wanted,
        refusal=refusal,
    )


def findings(case: Case) -> tuple[Finding, ...]:
    """Every finding, errors first."""
    found = [*case.shards.findings, *(finding for check in CHECKS for finding in check(case))]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def report(case: Case, parent: Path | None, memories: tuple[int, ...], began: float) -> Report:
    """The case, written up."""
    layers = describe.layers(case)
    total = sum(info.nbytes for info in case.shards)
    parameters = sum(layer.parameters for layer in layers)
    kv_dtype, kv_bytes = describe.kv_cache(case)
    return Report(
        schema=SCHEMA,
        path=str(case.folder),
        architecture=describe.architecture(case.config),
        files=len(case.shards.files),
        method=case.quant.method,
        algo=case.quant.algo,
        kv_algo=case.quant.kv_algo,
        producer=case.quant.producer,
        exclude=case.quant.exclude,
        layers=layers,
        groups=describe.groups(layers),
        parameters=parameters,
        bytes=total,
        bytes_by_format=describe.bytes_by_format(layers, total),
        ratio_to_bf16=total / (2 * parameters) if parameters else 0.0,
        kv_dtype=kv_dtype,
        kv_bytes_per_token=kv_bytes,
        fits=describe.fits(total, kv_bytes, memories),
        findings=findings(case),
        parent=_parent(case, parent),
        repair=None,
        seconds=round(time.monotonic() - began, 3),
    )


def _expected(config: dict[str, Any], expect: Expect, stored: set[str]) -> tuple[Expected | None, str | None]:
    """What the model reads, named as in these files, or why it cannot be built."""
    try:
        wanted = expect(config)
    except UnsupportedFormatError as error:
        return None, str(error)
    return None if wanted is None else wanted.placed(stored), None


def _config(folder: Path) -> dict[str, Any]:
    """config.json, or nothing where the folder has none: that is a finding."""
    if folder.is_dir() and not (folder / CONFIG).exists():
        return {}
    return read_config(folder)


def _parent(case: Case, path: Path | None) -> Parent | None:
    if path is None:
        return None
    compared = [(m.comparison, m.name) for m in case.layers if m.comparison is not None]
    compared.sort(key=lambda pair: (pair[0].sqnr_db, pair[1]))
    quantised = [m for m in case.layers if m.stored.block is not None]
    signal, noise = sum(c.signal for c, _ in compared), sum(c.noise for c, _ in compared)
    return Parent(
        path=str(path),
        compared=tuple(name for _, name in compared),
        missing=tuple(m.name for m in quantised if m.comparison is None),
        sqnr_db=describe.finite(sqnr_db(signal, noise)) if compared else None,
    )
