"""docs/observability.md lists every metric with type, labels and meaning, as a scrape has them."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nvfp4_runtime.engine.messages import MachineLimits, StepStats
from server.fault_metrics import FaultMetrics
from server.metrics import Metrics
from server.request_record import RequestRecord
from tests.fakes import FakeEngine, fake_info

DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"
START, END = "<!-- metrics -->\n", "<!-- end -->"
IMPLIED = {"model_name", "engine", "le"}


def table() -> str:
    """Every metric of a server whose every metric has samples."""
    engine = FakeEngine()
    info = fake_info(limits=MachineLimits(1e9, 1e9, "configured"), scratch_bytes={"step": 1})
    metrics = Metrics("tiny", info, StepStats(0, 0, 64, 0, 64))
    FaultMetrics(metrics.registry, ("tiny", "0"), engine)
    metrics.engine.on_step(StepStats(0, 0, 64, 0, 64, num_steps=1, phase_seconds={"model": 1.0}))
    metrics.http.ended(RequestRecord("r", "GET", "/v1/models", 0.0, handler="/v1/models", status=200))
    rows = ["| name | type | labels | |", "| --- | --- | --- | --- |"]
    for family in sorted(text_string_to_metric_families(metrics.render().decode()), key=lambda each: each.name):
        assert family.samples, f"{family.name} has no samples here: its labels are not known"
        labels = sorted({label for sample in family.samples for label in sample.labels} - IMPLIED)
        name, text = family.name, family.documentation
        rows.append(f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {text} |")
    return "\n".join(rows) + "\n"


def test_the_documents_table_is_what_a_scrape_has() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    expected = table()
    assert text.split(START)[1].split(END)[0] == expected, f"put this between the marks:\n{expected}"
