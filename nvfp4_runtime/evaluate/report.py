"""What an evaluation found: a structure for programs, and the same as a table to read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import msgspec

from nvfp4_runtime.evaluate.divergence import Interval

WIDTH = 100


class Worst(msgspec.Struct):
    """A position where student and teacher differ most. Texts are decoded tokens; probabilities are 0 to 1.

    position  of the token that was predicted, in its window
    """

    kl: float
    window: int
    position: int
    context: str
    token: str
    teacher_token: str
    teacher_prob: float
    student_token: str
    student_prob: float


class Divergence(msgspec.Struct):
    """A student against its teacher, over all scored positions.

    kl              KL(teacher || student) in nats, over the full vocabulary
    kl_by_window    its mean in each window, by which students of one teacher can be compared pair by pair
    nll_difference  mean of the student's NLL minus the teacher's, position by position
    top1_agreement  share of positions where both have the same likeliest token
    """

    kl: Interval
    kl_percentiles: dict[str, float]
    kl_by_window: list[float]
    nll_difference: Interval
    top1_agreement: Interval
    worst: list[Worst]


class Measured(msgspec.Struct):
    """One model in one arithmetic.

    weight_bytes  of the checkpoint, by stored format
    kernels       what ran the linear layers, as the server's start-up screen has it
    seconds       of forward passes alone
    """

    model: str
    numerics: str
    numerics_reason: str
    dtype: str
    kv_dtype: str
    weight_bytes: dict[str, int]
    kernels: list[str]
    nll: Interval
    perplexity: Interval
    seconds: float
    tokens_per_second: float
    divergence: Divergence | None = None


class Report(msgspec.Struct):
    """Everything an evaluation says. `notes`: what a reader should know besides."""

    version: str
    protocol: str
    intervals: str
    text: str
    text_sha256: str
    text_tokens: int
    window: int
    num_windows: int
    num_scored: int
    teacher: Measured | None
    students: list[Measured]
    notes: list[str]


def to_json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def render(report: Report) -> str:
    """Protocol, one line per model and arithmetic, and the positions where the first student differs most."""
    lines = [f"text      {report.text} (sha256 {report.text_sha256[:16]}), {report.num_scored:,} scored positions"]
    lines += textwrap.wrap(report.protocol, WIDTH, initial_indent="protocol  ", subsequent_indent=" " * 10)
    lines += textwrap.wrap(report.intervals, WIDTH, initial_indent="intervals ", subsequent_indent=" " * 10)
    lines += [f"note      {note}" for note in report.notes]
    everyone = [*([report.teacher] if report.teacher else []), *report.students]
    names = [*(["teacher"] if report.teacher else []), *("" for _ in report.students)]
    rows: list[tuple[str, ...]] = [("", "model", "numerics", "KV cache", "size", "NLL", "perplexity", "tokens/s")]
    rows += [
        (
            name,
            one.model,
            one.numerics,
            one.kv_dtype,
            f"{sum(one.weight_bytes.values()) / 1e6:.1f} MB",
            with_interval(one.nll, 4),
            with_interval(one.perplexity, 2),
            f"{one.tokens_per_second:.0f}",
        )
        for name, one in zip(names, everyone, strict=True)
    ]
    lines += ["", *table(rows, left=2)]
    compared = [(one, one.divergence) for one in report.students if one.divergence is not None]
    if compared:
        rows = [("numerics", "KL to teacher", "p50", "p90", "p99", "p99.9", "max", "NLL difference", "same top token")]
        rows += [
            (
                one.numerics,
                with_interval(found.kl, 4),
                *(f"{value:.4f}" for value in found.kl_percentiles.values()),
                with_interval(found.nll_difference, 4),
                with_interval(found.top1_agreement, 4),
            )
            for one, found in compared
        ]
        lines += ["", *table(rows, left=1)]
    for one, found in compared:
        if found.worst:
            lines += ["", f"where {one.numerics} differs most:", *(_worst_line(worst) for worst in found.worst)]
    return "\n".join(lines)


def with_interval(value: Interval, digits: int) -> str:
    """1.2345 [1.1, 1.4], or the mean alone."""
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines with columns two spaces apart: the first `left` columns to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(width) if i < left else c.rjust(width) for i, (c, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return lines


def _worst_line(worst: Worst) -> str:
    return (
        f"  KL {worst.kl:7.3f}  window {worst.window} token {worst.position}: {worst.context!r} -> {worst.token!r}; "
        f"teacher {worst.teacher_token!r} {worst.teacher_prob:.2f}, student {worst.student_token!r} "
        f"{worst.student_prob:.2f}"
    )
