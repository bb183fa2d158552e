"""`nvfp4 inspect --repair OUT`: a sound copy, written tensor by tensor, and the truth about what was changed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from nvfp4_runtime.checkpoint.detect import CONFIG, HF_QUANT
from nvfp4_runtime.checkpoint.doctor import describe
from nvfp4_runtime.checkpoint.doctor.case import Case
from nvfp4_runtime.checkpoint.doctor.checks import inputs
from nvfp4_runtime.checkpoint.doctor.declare import declared
from nvfp4_runtime.checkpoint.doctor.decode import matrix, read_any, same_bytes
from nvfp4_runtime.checkpoint.doctor.expected import Expect, nothing_expected
from nvfp4_runtime.checkpoint.doctor.inspect import (
    Progress,
    examine,
    findings,
    no_progress,
    open_parent,
    report,
)
from nvfp4_runtime.checkpoint.doctor.report import Change, Finding, Repair, Report
from nvfp4_runtime.checkpoint.doctor.statistics import Advance
from nvfp4_runtime.checkpoint.doctor.treatment import Plan
from nvfp4_runtime.checkpoint.doctor.treatments import plan
from nvfp4_runtime.checkpoint.shards import INDEX, SINGLE, Shards, TensorInfo
from nvfp4_runtime.checkpoint.stored import stored_layer
from nvfp4_runtime.checkpoint.writer import ShardWriter, TensorSpec, check_place, new_folder, write_json
from nvfp4_runtime.errors import CheckpointError

# What travels with the weights. Nothing else is copied: no code, no pickles, no other weights.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".md", ".yaml")
_NAMES = ("LICENSE", "NOTICE")
# Findings that a rewritten index would hide: what they name is lost all the same.
_LOST = ("index-missing-file", "index-missing-tensor")


def inspect_and_repair(
    path: str | Path,
    out: str | Path,
    parent: str | Path | None = None,
    memories: Iterable[int] = describe.MEMORIES,
    progress: Progress = no_progress,
    expect: Expect = nothing_expected,
) -> Report:
    """Inspect `path`, write a copy with every sure cure applied to the new folder `out`, and inspect that.

    The report is of the original; its `repair` says what changed and what is still wrong with the copy, which keeps its
    name all the same. Weights keep their values to the bit unless a change says otherwise, and that is verified on the
    copy.
    Raises ConfigError when `out` is not empty or inside what is read, CheckpointError when files are unreadable.
    """
    began = time.monotonic()
    folder, target = Path(path).expanduser(), Path(out).expanduser()
    check_place(target, folder)
    if parent is not None:
        check_place(target, Path(parent).expanduser())
    original = open_parent(parent)
    case = examine(folder, original, progress, expect)
    found = findings(case)
    made = plan(case, original)
    config, record, changes = declared(case, found, _all_have_input(case, made))
    changes = [*_file_changes(case), *made.changes, *changes]
    with new_folder(target) as temporary:
        _write_tensors(case, made, temporary, progress)
        _copy_companions(folder, temporary)
        if config:
            write_json(temporary / CONFIG, config)
        if record is not None:
            write_json(temporary / HF_QUANT, record)
        _verify(case.shards, Shards(temporary), made)
    copy = examine(target, original, progress, expect)
    remaining = [*_lost_for_good(case, found), *made.refused, *findings(copy)]
    written = report(case, Path(parent).expanduser() if parent is not None else None, tuple(memories), began)
    done = Repair(str(target), tuple(changes), tuple(f for f in remaining if f.severity != "info"))
    return dataclasses.replace(written, repair=done)


def _all_have_input(case: Case, made: Plan) -> bool:
    new = {spec.name for treatment in made.treatments for spec in treatment.specs}
    return all(
        (m.input_scale is not None and not inputs.is_input_invalid(m)) or f"{m.name}.input_scale" in new
        for m in case.nvfp4
    )


def _file_changes(case: Case) -> list[Change]:
    """What writing shards and index anew cures by itself."""
    cured = {
        "index-wrong-file": "the index names the right shard",
        "index-stray-tensor": "the index lists it",
        "index-total-size": "total_size is the tensors' size",
        "index-absent": "an index is written where there are several shards",
        "index-stray-file": "not copied",
        "duplicate-tensor": "one copy is kept",
    }
    return [
        Change(finding.id, name, cured[finding.id], True)
        for finding in case.shards.findings
        if finding.id in cured
        for name in finding.layers
    ]


def _write_tensors(case: Case, made: Plan, folder: Path, progress: Progress) -> None:
    """Every tensor in the original's order, the treated ones by their treatment."""
    new = {spec.name: spec for treatment in made.treatments for spec in treatment.specs}
    kept = [info for info in case.shards if info.name not in made.dropped]
    specs = [new.get(info.name, TensorSpec(info.name, info.dtype, info.shape)) for info in kept]
    specs += [spec for name, spec in new.items() if name not in case.shards]
    advance: Advance = progress("writing", sum(spec.nbytes for spec in specs))
    with ShardWriter(folder, specs) as writer:
        for info in kept:
            if info.name not in new:
                writer.write(info.name, read_any(case.shards, info.name))
                advance(info.nbytes)
        for treatment in made.treatments:
            for name, tensor in treatment.make().items():
                writer.write(name, tensor)
                advance(tensor.nbytes)


def _copy_companions(source: Path, out: Path) -> None:
    for file in sorted(source.iterdir()):
        known = file.suffix in _COMPANIONS or file.name.startswith(_NAMES)
        if file.is_file() and known and file.name not in (CONFIG, HF_QUANT, INDEX):
            shutil.copyfile(file, out / file.name)


def _verify(before: Shards, after: Shards, made: Plan) -> None:
    """Every layer whose values must not change dequantises to the same bits from both folders."""
    for treatment in made.treatments:
        for name in treatment.exact:
            pair = []
            for shards in (before, after):
                stored = stored_layer(shards, name)
                pair.append(matrix(shards, stored) if stored is not None else None)
            old, new = pair
            assert old is not None, f"{name} was read a moment ago"
            assert new is not None, f"{name} was written a moment ago"
            step = old.rows_per_chunk
            same = all(
                torch.equal(old.rows(i, i + step).view(torch.int32), new.rows(i, i + step).view(torch.int32))
                for i in range(0, old.n, step)
            )
            assert same, f"the repaired copy of {name} would change its weights"


def _lost_for_good(case: Case, found: Sequence[Finding]) -> list[Finding]:
    """Findings of the original that the copy cannot show any more and that were not cured."""
    lost = [finding for finding in found if finding.id in _LOST]
    for finding in case.shards.findings:
        if finding.id == "index-stray-file" and SINGLE in finding.layers and finding.severity == "error":
            lost.append(finding)
        if finding.id == "duplicate-tensor" and (unsure := _differing_copies(case)):
            lost.append(
                dataclasses.replace(
                    finding,
                    message=f"{len(unsure)} tensor(s) are in two files with different contents, and nothing says which "
                    f"is meant: {', '.join(unsure[:3])}",
                    layers=tuple(unsure),
                )
            )
    return lost


def _differing_copies(case: Case) -> list[str]:
    """Tensors in two files whose bytes differ and of which the index names neither file."""
    unsure = []
    for copy in case.shards.copies:
        named = case.shards.index["weight_map"].get(copy.name) if case.shards.index is not None else None
        kept = case.shards.require(copy.name)
        if named not in (kept.file.name, copy.file.name) and not _same(case.shards, copy):
            unsure.append(copy.name)
    return unsure


def _same(shards: Shards, copy: TensorInfo) -> bool:
    try:
        with safe_open(copy.file, framework="pt") as handle:
            return same_bytes(read_any(shards, copy.name), handle.get_tensor(copy.name))
    except OSError as error:
        raise CheckpointError(f"cannot read {copy.file}: {error.strerror or error}") from error
