"""Dockerfile, compose.yaml and systemd unit say what they must: parsed here; test_image.py builds and runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from server.cli import _flags_from_environment, _parser
from server.config import environment_flags
from tests.deploy.manifests import run, tool

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word.upper(), " ".join(rest.split())) for word, rest in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions by its name, after those of the stage it starts from."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            origin, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(origin, []))
        current.append((word, rest))
    return found


TARGETS = ("cpu", "cuda")


def compose() -> dict:
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_the_last_stage_which_is_built_by_default_is_the_cpu_image():
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_an_unprivileged_user_with_a_health_check(target):
    stage = dict(stages()[target])
    assert stage["USER"] == "10001:0"
    assert "/health'" in stage["HEALTHCHECK"]
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert not any(word == "RUN" and ("g++" in rest or "pip" in rest) for word, rest in stages()[target])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_holds_no_secret_and_no_model(target):
    assert not any(word in ("COPY", "ADD") and "--from=packages-" not in rest for word, rest in stages()[target])
    variables = " ".join(rest for word, rest in instructions() if word in ("ENV", "ARG"))
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", variables)


@pytest.mark.parametrize("target", TARGETS)
def test_the_entrypoint_is_the_exec_form_and_takes_its_port_from_the_environment(target, monkeypatch):
    stage = dict(stages()[target])
    assert json.loads(stage["ENTRYPOINT"]) == ["nvfp4", "serve"]  # the shell form would be PID 1 and keep SIGTERM
    variables = dict(pair.split("=", 1) for word, rest in stages()[target] if word == "ENV" for pair in rest.split())
    for name in ("NVFP4_HOST", "NVFP4_PORT"):
        monkeypatch.setenv(name, variables[name])
    parser, serve = _parser()
    given = ["serve", *compose()["services"]["nvfp4"]["command"]]
    given[1:1] = _flags_from_environment(serve, parser.parse_args(given))
    args = parser.parse_args(given)
    assert (args.host, args.port, args.model) == ("0.0.0.0", 8000, "/model")
    assert compose()["services"]["nvfp4"]["environment"]["NVFP4_ALLOW_UNAUTHENTICATED"] == "1"
    assert "allow_unauthenticated" in vars(args)


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_port_that_the_server_was_given(status):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    command = json.loads(dict(stages()["cpu"])["HEALTHCHECK"].split("CMD ", 1)[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "NVFP4_PORT": str(server.server_port)}
        done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
        server.shutdown()
    assert (done.returncode == 0) == (status == 200)


def test_every_dependency_of_ours_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["otel"])]
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert "torch" not in pinned, "the Dockerfile pins it, by target"
    for requirement in wanted:
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_hadolint_finds_nothing():
    run(tool("hadolint"), str(ROOT / "Dockerfile"))


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
    assert [rest for word, rest in instructions() if rest.startswith("TORCH=")] == [f"TORCH={pinned[1]}"] * 2


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


def test_the_gpu_file_of_compose_changes_target_image_and_device_alone():
    (changed,) = yaml.safe_load((ROOT / "deploy" / "compose.cuda.yaml").read_text())["services"].values()
    service = compose()["services"]["nvfp4"]
    assert changed.keys() == {"build", "image", "command", "deploy"}
    assert (service["build"]["target"], changed["build"]["target"]) == TARGETS
    assert service["image"].removesuffix("-cpu") == changed["image"].removesuffix("-cuda")
    assert changed["command"] == [*service["command"], "--device", "cuda"]


def test_prometheus_scrapes_the_service_by_its_name_and_port():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose()["services"]
    assert ("EXPOSE", port) in stages()["cpu"]


def unit() -> tuple[str, dict[str, str]]:
    """The systemd unit and its environment file."""
    folder = ROOT / "deploy" / "systemd"
    pairs = (
        line.split("=", 1) for line in (folder / "nvfp4.env").read_text().splitlines() if line[:1] not in ("#", "")
    )
    return (folder / "nvfp4.service").read_text(), dict(pairs)


def test_the_unit_starts_with_flags_that_serve_has_and_waits_longer_than_they_say(monkeypatch):
    text, variables = unit()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = re.search(r"^ExecStart=\S+ (.*)$", text, flags=re.M)[1].split()
    parser, serve = _parser()
    command[1:1] = _flags_from_environment(serve, parser.parse_args(command))
    args = parser.parse_args(command)
    assert {name.removeprefix("NVFP4_").lower() for name in variables} <= vars(args).keys()
    assert environment_flags(["model"])["model"] == variables["NVFP4_MODEL"]
    assert (
        int(re.search(r"^TimeoutStopSec=(\d+)$", text, flags=re.M)[1]) >= args.drain_delay + args.shutdown_timeout + 10
    )
    assert re.search(r"^RestartPreventExitStatus=1$", text, flags=re.M), "1 is a flag that is wrong"


def test_systemd_accepts_the_unit_and_finds_it_confined(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    copy = tmp_path / "nvfp4.service"
    copy.write_text(unit()[0].replace("/opt/nvfp4/bin/nvfp4", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = run("systemd-analyze", "security", "--offline=true", str(copy))
    assert float(re.search(r"exposure level for nvfp4.service: ([\d.]+)", found)[1]) < 2.5
