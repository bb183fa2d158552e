"""The report for people: plain text, aligned, coloured only where it is told that a terminal reads it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from nvfp4_runtime.checkpoint.doctor import describe
from nvfp4_runtime.checkpoint.doctor.report import NO_DECIBELS, Finding, Group, Repair, Report, Scales, Severity
from nvfp4_runtime.errors import printable

_COLOURS: dict[Severity, str] = {"error": "31;1", "warning": "33;1", "info": "36"}
_WIDTH = 118
_WORST = 10
_LISTED = 20
_GIB = 1 << 30
_NOT_FINITE = "not finite"


def render(report: Report, colour: bool = False, every_layer: bool = False) -> str:
    """The whole report; `colour` adds ANSI colours to severities, `every_layer` ungroups the table.

    Control characters in names and values of the files are escaped.
    """
    report = _escaped(report)
    rows = describe.ungrouped(report.layers) if every_layer else report.groups
    lines = [*_heading(report), "", *_table(rows), "", *_totals(report)]
    if report.parent is not None:
        lines += ["", *_parent(report)]
    if report.findings:
        lines += ["", *_findings(report.findings, colour)]
    if report.repair is not None:
        lines += ["", *_repair(report.repair, colour)]
    lines += ["", _verdict(report, colour)]
    return "\n".join(lines)


def _escaped(value: Any) -> Any:
    """The same report with every text in it safe to print."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(map(_escaped, value))
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _escaped(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def _heading(report: Report) -> list[str]:
    declared = f"{report.method} {report.algo or ''}".strip() + (f" by {report.producer}" if report.producer else "")
    return [
        f"{report.path}: {report.architecture}, {report.parameters:,} parameters in {report.files} file(s)",
        f"declared: {'not quantised' if report.method == 'none' else declared}"
        + (f", KV cache {report.kv_algo}" if report.kv_algo else ""),
    ]


def _table(groups: Sequence[Group]) -> list[str]:
    head = ("layers", "count", "shape", "stored", "bits/weight", "MB", "block scales", "tensor scale", "dB", "excluded")
    compared = any(group.worst_sqnr_db is not None for group in groups)
    rows = [head, *(_row(group) for group in groups)]
    if not compared:
        rows = [row[:8] + row[9:] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 3, len(widths) - 1}
    return [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(group: Group) -> tuple[str, ...]:
    scales = group.scales or Scales()
    excluded = {None: "-", True: f"yes, {group.why}", False: "no"}[group.excluded]
    note = "" if group.input_scale or group.stored != "nvfp4" else " (no input_scale: W4A16 only)"
    if group.excluded is False and group.stored in ("bf16", "fp16", "fp32"):
        note += f" ({group.why})"
    block = f"{scales.block_min:g} to {scales.block_max:g}" if scales.block_min is not None else ""
    return (
        group.name,
        str(group.count),
        "x".join(map(str, group.shape)),
        group.stored,
        f"{group.bits_per_weight:.3f}",
        f"{group.bytes / 1e6:.2f}",
        block,
        f"{scales.tensor:.3g}" if scales.tensor is not None else "",
        _decibels(group.worst_sqnr_db, 1) if group.worst_sqnr_db is not None else "",
        f"{excluded}{note}",
    )


def _totals(report: Report) -> list[str]:
    formats = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in report.bytes_by_format.items())
    lines = [f"total {report.bytes / 1e6:.2f} MB ({formats}); {report.ratio_to_bf16:.3f} of BF16"]
    if report.kv_bytes_per_token is not None:
        lines.append(f"KV cache: {report.kv_dtype}, {report.kv_bytes_per_token:,} bytes per token")
    fits = []
    for fit in report.fits:
        size = f"{fit.memory_bytes / _GIB:g} GiB"
        if not fit.weights_fit:
            fits.append(f"{size}: no")
        else:
            fits.append(f"{size}: {_short(fit.kv_tokens)} tokens" if fit.kv_tokens is not None else f"{size}: yes")
    if fits:
        lines += _wrapped("fits (weights, and tokens of KV cache in the rest): ", ", ".join(fits))
    return lines


def _parent(report: Report) -> list[str]:
    parent = report.parent
    assert parent is not None
    by_name = {layer.name: layer for layer in report.layers}
    overall = f", {_decibels(parent.sqnr_db, 2, ' dB')} over all" if parent.sqnr_db is not None else ""
    lines = [f"against {parent.path}: {len(parent.compared)} layer(s) compared{overall}; worst first"]
    for name in parent.compared[:_WORST]:
        layer = by_name[name]
        assert layer.sqnr_db is not None
        error = _NOT_FINITE if layer.relative_error is None else f"{layer.relative_error:8.5f}"
        lines.append(f"  {_decibels(layer.sqnr_db, 2, ' dB'):>11}  relative error {error}  {name}")
    if parent.missing:
        lines.append(f"  {len(parent.missing)} layer(s) could not be compared, e.g. {parent.missing[0]}")
    return lines


def _decibels(value: float, digits: int, unit: str = "") -> str:
    return _NOT_FINITE if value == -NO_DECIBELS else f"{value:.{digits}f}{unit}"


def _findings(findings: Iterable[Finding], colour: bool) -> list[str]:
    lines = []
    for finding in findings:
        message = _wrapped(f"{finding.severity}: {finding.id}: ", finding.message)
        lines += [_paint(message[0], finding.severity, colour), *message[1:]]
        lines += _wrapped("    remedy: ", finding.remedy)
    return lines


def _repair(repair: Repair, colour: bool) -> list[str]:
    lines = [f"repaired copy: {repair.out}; {len(repair.changes)} change(s)"]
    for change in repair.changes[:_LISTED]:
        kept = "values unchanged" if change.exact else "values change"
        lines += _wrapped(f"  {change.layer}: ", f"{change.what} ({kept}; {change.finding})")
    if len(repair.changes) > _LISTED:
        lines.append(f"  and {len(repair.changes) - _LISTED} more (--json lists all)")
    if repair.remaining:
        lines += ["not repaired:", *_findings(repair.remaining, colour)]
    return lines


def _verdict(report: Report, colour: bool) -> str:
    judged = report.findings if report.repair is None else report.repair.remaining
    counts = {severity: sum(f.severity == severity for f in judged) for severity in _COLOURS}
    which = "the repaired copy is " if report.repair is not None else ""
    if report.sound:
        text = f"{which}sound"
        return f"{text} (looked at in {report.seconds:.1f} s)"
    text = f"{which}not sound: {counts['error']} error(s), {counts['warning']} warning(s)"
    if report.repair is not None:
        text += f"; it is kept in {report.repair.out}, and what remains is listed above: do not take it for a sound one"
    severity: Severity = "error" if counts["error"] else "warning"
    return f"{_paint(text, severity, colour)} (looked at in {report.seconds:.1f} s)"


def _paint(text: str, severity: Severity, colour: bool) -> str:
    return f"\x1b[{_COLOURS[severity]}m{text}\x1b[0m" if colour else text


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(lead + text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _short(count: int) -> str:
    """1234567 as 1.2M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
