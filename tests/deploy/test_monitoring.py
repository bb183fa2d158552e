"""Alert rules and the dashboard speak of metrics and labels that a server has: read off a scrape."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from nvfp4_runtime.engine.messages import MachineLimits
from tests.deploy.manifests import RELEASES, helm_template, of_kind
from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve, serve  # noqa: F401 - a fixture

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "nvfp4.json").read_text())
NAME = re.compile(r"\b(?:vllm:|nvfp4_|http_|process_)[a-z0-9_]+(?:\{[^}]*\})?")
ADDED_BY_PROMETHEUS = {"instance", "job", "namespace", "pod"}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


EXPRESSIONS = {rule["alert"]: [rule["expr"]] for rule in alerts()} | {
    panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels()
}
SCALING = yaml.safe_load((DEPLOY / "kubernetes" / "components" / "keda" / "scaledobject.yaml").read_text())
EXPRESSIONS |= {f"scaling by {one['name']}": [one["metadata"]["query"]] for one in SCALING["spec"]["triggers"]}


@pytest.fixture
async def scraped(serve: Serve) -> dict[str, set[str]]:  # noqa: F811
    """Labels by sample name, of a server whose every metric has samples."""
    info = fake_info(limits=MachineLimits(1e9, 1e9, "configured"), scratch_bytes={"step": 1})
    server = await serve(FakeEngine(info=info))
    await server.complete(max_tokens=2)
    server.engine.stats.phase_seconds = {"model": 1.0}
    server.app.state.server.metrics.engine.on_step(server.engine.stats)
    text = (await server.http.get("/metrics")).text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("used_in", EXPRESSIONS)
def test_every_metric_and_label_is_in_a_scrape(used_in: str, scraped: dict[str, set[str]]) -> None:
    for expression in EXPRESSIONS[used_in]:
        selectors = NAME.findall(expression)
        assert selectors or expression.startswith("up{"), expression
        labels = set()
        for selector in selectors:
            name, _, matchers = selector.partition("{")
            assert name in scraped, f"{name} is in no scrape"
            labels |= scraped[name]
            for label in re.findall(r"(\w+)\s*[=!]~?", matchers):
                assert label in scraped[name] | ADDED_BY_PROMETHEUS, f"{name} has no label {label}"
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", group)) <= labels | ADDED_BY_PROMETHEUS, expression


def test_the_chart_scales_by_the_metrics_that_kustomize_scales_by() -> None:
    (scaled,) = of_kind(helm_template(RELEASES["everything"]), "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    ours = [trigger["metadata"]["query"] for trigger in SCALING["spec"]["triggers"]]
    assert [re.sub(r', pod=~"nvfp4-\.\*"', "", query) for query in queries] == ours


async def test_an_endpoint_picker_finds_its_gauges_by_their_default_names(scraped: dict[str, set[str]]) -> None:
    """The model server protocol of the Gateway API Inference Extension, under vLLM's names."""
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= scraped.keys()
    assert {"block_size", "num_gpu_blocks"} <= scraped["vllm:cache_config_info"]


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_what_compose_mounts_and_provisions_exists_and_fits_together() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = {}
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
                mounted[target] = DEPLOY / source
    (rules,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["rule_files"]
    assert mounted[f"/etc/prometheus/{rules}"] == ALERTS
    provisioning = mounted["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "nvfp4.yml").read_text())["providers"]
    assert (mounted[provider["options"]["path"]] / "nvfp4.json").exists()
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


@pytest.mark.parametrize(
    ("command", "argument"), [(("check", "rules"), "alerts.yml"), (("test", "rules"), "alerts.test.yml")]
)
def test_promtool_accepts_the_rules_and_they_fire_when_they_should(command: tuple[str, str], argument: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(
        ["promtool", *command, argument], cwd=ALERTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
