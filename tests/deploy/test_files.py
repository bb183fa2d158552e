"""The deployment files say what they must: parsed here, since no container engine is at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from server.cli import _parser

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word.upper(), " ".join(rest.split())) for word, rest in lines]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    last_from = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[last_from:]


def compose() -> dict:
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_the_image_runs_as_an_unprivileged_user_with_a_health_check():
    stage = dict(final_stage())
    assert stage["USER"] == "10001:0"
    assert "/health" in stage["HEALTHCHECK"]
    assert not any(word == "RUN" and ("g++" in rest or "pip" in rest) for word, rest in final_stage())


def test_the_entrypoint_is_the_exec_form_of_flags_that_serve_has():
    stage = dict(final_stage())
    command = json.loads(stage["ENTRYPOINT"])  # the shell form is no JSON; PID 1 would then not get SIGTERM
    assert command[0] == "nvfp4"
    args = _parser()[0].parse_args([*command[1:], *compose()["services"]["nvfp4"]["command"]])
    assert (args.host, args.port, args.model) == ("0.0.0.0", 8000, "/model")
    assert compose()["services"]["nvfp4"]["environment"]["NVFP4_ALLOW_UNAUTHENTICATED"] == "1"
    assert "allow_unauthenticated" in vars(args)
    health = json.loads(stage["HEALTHCHECK"].split("CMD ", 1)[1])
    assert f":{args.port}/health" in health[-1]


def test_all_that_is_copied_exists_and_is_let_through():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_holds_the_torch_that_make_install_uses():
    pinned = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert pinned is not None
    assert ("ARG", f"TORCH={pinned[1]}") in instructions()


@pytest.mark.parametrize("service", ["nvfp4", "prometheus", "grafana"])
def test_compose_services_have_no_more_rights_than_they_need(service):
    found = compose()["services"][service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in found["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in found["ports"])
    assert re.search(r":v?\d", found["image"]), "pin a version"


def test_compose_waits_longer_than_the_server_drains():
    service = compose()["services"]["nvfp4"]
    drain = float(service["command"][service["command"].index("--shutdown-timeout") + 1])
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain + 10


def test_prometheus_scrapes_the_service_by_its_name_and_port():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose()["services"]
    assert ("EXPOSE", port) in final_stage()
