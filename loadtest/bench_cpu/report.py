"""Tables in Markdown, and the bars this project set itself: each met or missed, with the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.bench_cpu.context import CONTEXT, ContextFigure
from loadtest.bench_cpu.llama_cpp import FOUR_BIT
from loadtest.bench_cpu.measure import Limits, Reading, Summary
from loadtest.bench_cpu.profile import ALLOWED_OUTSIDE, StepProfile
from loadtest.bench_cpu.server_figures import START_SECONDS, ServerFigures
from loadtest.bench_cpu.shapes import Shape

DECODE_SHARE, DECODE_OVER_NVFP4, DECODE_OVER_FOUR_BIT = 0.80, 2.0, 1.5
BATCH_OVER_FOUR_BIT = 2.2
# numerics -> (share of the VNNI peak, times llama.cpp's fastest 4-bit type)
PREFILL_FIGURE = "prefill 512"  # a shorter one, of --quick, meets and misses nothing
PREFILL = {"w4a16": (0.20, 1.4), "w4a8": (0.40, 2.5), "w4a4": (0.40, 2.5)}
CONTEXT_SHARE = 0.70
BATCHES = (8, 16)
Found = dict[tuple[str, str], Summary]  # by side and figure


@dataclass(frozen=True)
class Bar:
    """What was asked of one figure. `more` is better, unless it says otherwise."""

    what: str
    asked: float
    found: float
    unit: str
    more: bool = True

    @property
    def met(self) -> bool:
        return self.found >= self.asked if self.more else self.found <= self.asked

    def __str__(self) -> str:
        sign = ">=" if self.more else "<="
        word = "met" if self.met else "MISSED"
        return f"{word:6}  {self.what}: {show(self.found, self.unit)} (asked {sign} {show(self.asked, self.unit)})"


def show(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.2f} {unit}"


def ratio_to_limit(shape: Shape, token_bytes: dict[str, float]) -> Any:
    """Reading -> its share of the limit that applies: read bandwidth for decode, the VNNI peak for prefill.

    A decode step over B sequences reads the weights once, so that tokens/s / B are steps/s. Sides whose bytes are
    unknown, and machines without VNNI, have no ratio.
    """

    def ratio(reading: Reading) -> float | None:
        leg, _, number = reading.figure.partition(" ")
        if leg == "prefill":
            peak = reading.limits.get("vnni")
            return None if peak is None else 2 * shape.num_linear * reading.value / peak
        num_bytes = token_bytes.get(reading.side)
        return None if num_bytes is None else num_bytes * reading.value / int(number) / reading.limits["read"]

    return ratio


def by_key(summaries: Iterable[Summary]) -> Found:
    return {(summary.side, summary.figure): summary for summary in summaries}


def speed_table(summaries: Sequence[Summary]) -> str:
    """Sides down, figures across: median tokens/s, and in brackets the share of the limit."""
    found = by_key(summaries)
    figures = list(dict.fromkeys(summary.figure for summary in summaries))
    sides = list(dict.fromkeys(summary.side for summary in summaries))
    rows = []
    for side in sides:
        cells = [_cell(found.get((side, figure))) for figure in figures]
        rows.append([side, *cells])
    return markdown(["tokens/s (share of the limit)", *figures], rows)


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    share = "" if summary.ratio is None else f" ({100 * summary.ratio:.0f} %)"
    return f"{summary.value:.1f}{share}"


def limits_table(spread: dict[str, tuple[float, float, float]]) -> str:
    units = {"read": "GB/s read"}
    rows = [
        [units.get(name, f"{name}, GOP/s"), *(f"{value / 1e9:.1f}" for value in values)]
        for name, values in spread.items()
    ]
    return markdown(["limit of this machine", "lowest", "median", "highest"], rows)


def context_table(figures: Sequence[ContextFigure]) -> str:
    rows = [
        [
            figure.kv_dtype,
            f"{figure.step_seconds * 1e3:.1f}",
            f"{figure.attention_seconds * 1e3:.1f}",
            f"{figure.kv_bytes / 1e6:.0f}",
            f"{100 * figure.ratio:.0f} %",
            f"{100 * figure.step_ratio:.0f} %",
        ]
        for figure in figures
    ]
    heads = [f"KV cache, {CONTEXT} tokens", "step, ms", "of it attention, ms", "K and V, MB"]
    return markdown([*heads, "attention / bandwidth", "step / bandwidth"], rows)


def profile_table(profile: StepProfile) -> str:
    rows = [[name, f"{s * 1e3:.3f}", f"{100 * s / profile.step:.1f} %"] for name, s in profile.parts.items()]
    rows.append(["step", f"{profile.step * 1e3:.3f}", "100 %"])
    return markdown(["part of a decode step, batch 1", "ms", "share"], rows)


def server_table(figures: dict[str, ServerFigures]) -> str:
    rows = [
        [
            name,
            f"{f.start_median:.2f} ({min(f.start_seconds):.2f} to {max(f.start_seconds):.2f})",
            f"{sum(f.pss_loaded.values()) / 1e6:.0f}",
            f"{sum(f.pss_worked.values()) / 1e6:.0f}",
            f"{f.pss_allowed / 1e6:.0f}",
        ]
        for name, f in figures.items()
    ]
    return markdown(["server", "exec to ready, s", "PSS loaded, MB", "PSS after work, MB", "allowed, MB"], rows)


def http_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        sides = [row[side] for side in ("nvfp4", "llama.cpp") if side in row]
        speeds = [f"{side['tokens_per_second']:.1f}" for side in sides] + ["-"] * (2 - len(sides))
        firsts = [f"{side['first_seconds'] * 1e3:.0f}" for side in sides] + ["-"] * (2 - len(sides))
        cells.append([str(row["streams"]), *speeds, f"{row['ratio']:.2f}" if "ratio" in row else "-", *firsts])
    heads = [
        "streams",
        "ours, tokens/s",
        "llama.cpp, tokens/s",
        "ratio",
        "ours, first token ms",
        "llama.cpp, first token ms",
    ]
    return markdown(heads, cells)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows])


def speed_bars(shape: Shape, summaries: Sequence[Summary], numerics: Sequence[str]) -> list[Bar]:
    """The bars of decode and prefill for each of our `numerics` that was measured, peers' where they were."""
    found = by_key(summaries)
    bars = []
    for kind in numerics:
        side = f"nvfp4 {kind}"
        if (single := found.get((side, "decode 1"))) is not None:
            what = f"{shape.name} {kind} decode 1"
            if single.ratio is not None:
                bars.append(Bar(f"{what} / read bandwidth", DECODE_SHARE, single.ratio, "%"))
            bars += _against(what, single, found, "decode 1", DECODE_OVER_FOUR_BIT)
            if (peer := found.get(("llama.cpp nvfp4", "decode 1"))) is not None:
                bars.append(Bar(f"{what} / llama.cpp NVFP4", DECODE_OVER_NVFP4, single.value / peer.value, "x"))
        for batch in BATCHES:
            figure = f"decode {batch}"
            if (several := found.get((side, figure))) is not None:
                bars += _against(f"{shape.name} {kind} {figure}", several, found, figure, BATCH_OVER_FOUR_BIT)
        if (prefill := found.get((side, PREFILL_FIGURE))) is not None:
            share, times = PREFILL[kind]
            what = f"{shape.name} {kind} {PREFILL_FIGURE}"
            if prefill.ratio is not None:
                bars.append(Bar(f"{what} / VNNI peak", share, prefill.ratio, "%"))
            bars += _against(what, prefill, found, PREFILL_FIGURE, times)
    return bars


def _against(what: str, ours: Summary, found: Found, figure: str, times: float) -> list[Bar]:
    """Against llama.cpp's fastest 4-bit type, where it was measured."""
    peers = [peer for kind in FOUR_BIT if (peer := found.get((f"llama.cpp {kind}", figure))) is not None]
    if not peers:
        return []
    fastest = max(peers, key=lambda peer: peer.value)
    return [Bar(f"{what} / {fastest.side}", times, ours.value / fastest.value, "x")]


def context_bars(figures: Sequence[ContextFigure]) -> list[Bar]:
    by_type = {figure.kv_dtype: figure for figure in figures}
    bars = []
    if (fp8 := by_type.get("fp8")) is not None:
        bars.append(Bar(f"FP8 KV, decode attention at {CONTEXT} / read bandwidth", CONTEXT_SHARE, fp8.ratio, "%"))
        if (nvfp4 := by_type.get("nvfp4")) is not None:
            times = nvfp4.attention_seconds / fp8.attention_seconds
            bars.append(Bar(f"NVFP4 KV attention time / FP8's at {CONTEXT}", 1.0, times, "x", more=False))
    return bars


def server_bars(figures: dict[str, ServerFigures], largest: str) -> list[Bar]:
    bars = [
        Bar(f"{name} PSS of all processes", f.pss_allowed / 1e6, f.pss_highest / 1e6, "MB", more=False)
        for name, f in figures.items()
    ]
    if largest in figures:
        bars.append(Bar(f"{largest} exec to ready", START_SECONDS, figures[largest].start_median, "s", more=False))
    return bars


def profile_bars(profile: StepProfile) -> list[Bar]:
    return [Bar("step outside kernels, default model, batch 1", ALLOWED_OUTSIDE, profile.outside, "%", more=False)]


def limits_line(limits: Limits) -> str:
    return ", ".join(f"{name} {value / 1e9:.1f}" for name, value in limits.items()) + " (GB/s, GOP/s)"
