"""The image, built and run: small, confined, answers, drains. Takes minutes, so only with --build-image."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.conftest import DefaultModel
from tests.deploy import image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

BASE, NAME = "localhost/python:slim-stand-in", "localhost/nvfp4:cpu"
MOST_BYTES = 1_000_000_000
# What a container engine's own files cost is not ours; what we add to any base is.
MOST_ADDED_BYTES = 850_000_000


class Built(NamedTuple):
    root: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    if not request.config.getoption("--build-image"):
        pytest.skip("takes minutes: run `make test-image`, or pytest with --build-image")
    image.skip_without_a_builder()
    folder = tmp_path_factory.mktemp("image")
    builder = image.Builder(folder)
    started = time.monotonic()
    builder.base(BASE)
    print(f"\nbase: {time.monotonic() - started:.0f} s")
    seconds = builder.build("cpu", BASE, NAME)
    root = builder.mounted(NAME)
    print(f"image: {seconds:.0f} s, {image.size_bytes(root) / 1e6:.0f} MB")
    yield Built(root, builder.config(NAME))
    builder("umount", "--all")
    builder("rm", "--all")
    builder("rmi", "--all", "--force")


def test_the_image_is_smaller_than_a_gigabyte(built: Built) -> None:
    added = image.size_bytes(built.root / "opt" / "nvfp4")
    print(f"of it /opt/nvfp4: {added / 1e6:.0f} MB")
    assert image.size_bytes(built.root) < MOST_BYTES
    assert added < MOST_ADDED_BYTES


def test_it_holds_no_model_no_compiler_no_installer_and_no_settings_of_the_builder(built: Built) -> None:
    opt = built.root / "opt" / "nvfp4"
    assert (opt / "bin" / "nvfp4").exists()
    assert list(opt.rglob("nvfp4_runtime/kernels/cpu/_native*.so")), "the native kernels"
    found = {path.suffix for path in opt.rglob("*") if path.suffix in (".safetensors", ".gguf", ".ptl")}
    assert not found
    assert not [name for name in ("gcc", "g++", "cc", "cmake") if (built.root / "usr" / "bin" / name).exists()]
    assert not (opt / "bin" / "pip").exists()
    assert not (built.root / "etc" / "pip.conf").exists()
    assert not (built.root / "src").exists()


def test_it_says_what_it_is(built: Built) -> None:
    labels = built.config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"title", "description", "version", "revision"} <= {name.rpartition(".")[2] for name in labels}
    assert built.config["User"] == "10001:0"
    assert built.config["StopSignal"] == "SIGTERM"
    assert "nvfp4-runtime" in (built.root / "opt" / "nvfp4" / "packages.txt").read_text()


def test_it_answers_a_chat_and_drains_as_pid_1_without_rights_on_a_read_only_root(
    built: Built, default_model: DefaultModel, tmp_path: Path
) -> None:
    port = free_port()
    environment = {"NVFP4_PORT": str(port), "NVFP4_ALLOW_UNAUTHENTICATED": "1", "NVFP4_DRAIN_DELAY": "1"}
    started = time.monotonic()
    with image.container(
        built.root, built.config, ["/mnt"], environment, default_model.nvfp4, tmp_path / "log"
    ) as running:
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wait_until_ready(http, running)
        print(f"ready after {time.monotonic() - started:.1f} s")
        confined(running.pid)

        answer = http.post(
            "/v1/chat/completions",
            json={"model": "mnt", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]

        command = built.config["Healthcheck"]["Test"]
        assert command[0] == "CMD"
        inside = ["chroot", str(built.root), "env", "-i", *built.config["Env"], f"NVFP4_PORT={port}", *command[1:]]
        assert subprocess.run(inside, check=False).returncode == 0

        story: list[str] = []
        reader = threading.Thread(target=stream, args=(http, story))
        reader.start()
        while len(story) < 3:
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGTERM)
        told = time.monotonic()
        while http.get("/health/ready").status_code == 200:
            assert time.monotonic() - told < 1
        assert running.running()
        assert subprocess.run(inside, check=False, capture_output=True).returncode != 0
        assert running.exit_code(timeout=60) == 0, running.log()
        print(f"drained in {time.monotonic() - told:.1f} s")
        reader.join()
        assert story[-1] == "[DONE]", "the stream that ran was finished"
        assert json.loads(story[-2])["choices"][0]["finish_reason"] == "length"


def confined(pid: int) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["0"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    options = {fields[4]: fields[5].split(",") for fields in mounts}
    assert "ro" in options["/"]
    assert "ro" in options["/mnt"]


def stream(http: httpx.Client, story: list[str]) -> None:
    body = {
        "model": "mnt", "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 200, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        story.extend(line.removeprefix("data: ") for line in response.iter_lines() if line)


def wait_until_ready(http: httpx.Client, running: image.Container) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and running.running():
        try:
            if http.get("/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server is not ready:\n{running.log()}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
