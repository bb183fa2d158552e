"""A live server's log, traces and screen in the terminal."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import httpx
import pytest

from server.top.scrape import ScrapeError, Server
from tests.e2e.conftest import Launch, LiveServer
from tests.server.test_tracing import receiver  # noqa: F401 - a fixture

KEY = "top-secret-key"


@pytest.fixture(scope="module")
def keyed(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[LiveServer, Path]:
    """A simulated server that logs JSON and wants a key, which is in the file."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY + "\n")
    flags = ("--simulate", "--simulate-step-seconds", "0.005", "--log-format", "json", "--log-level", "debug")
    return launch(*flags, "--api-key-file", str(file)), file


def ask(server: LiveServer, max_tokens: int = 40) -> None:
    body = {"prompt": "my private words", "max_tokens": max_tokens}
    headers = {"authorization": f"Bearer {KEY}"}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()


def test_every_line_of_a_json_log_is_an_object_without_words_or_keys(keyed: tuple[LiveServer, Path]) -> None:
    server, _ = keyed
    ask(server)
    assert server.output() == "", "no screen for people"
    late = time.monotonic() + 10
    while '"output_tokens": 40' not in (log := server.log()) and time.monotonic() < late:
        time.sleep(0.05)  # an answer's line is written once it has gone
    records = [json.loads(line) for line in log.splitlines()]
    assert {"ready at " + server.url} <= {record["message"] for record in records}
    (access,) = (record for record in records if record.get("output_tokens") == 40)
    assert access["prompt_tokens"] == len("my private words")
    assert 0 < access["queue_seconds"] < access["ttft_seconds"] < access["duration_seconds"]
    assert KEY not in log
    assert "private" not in log


def test_steps_of_a_live_engine_are_told_by_phase(simulated: LiveServer) -> None:
    before = simulated.metric("nvfp4_engine_steps_total")
    httpx.post(f"{simulated.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 10}, timeout=60)
    found = simulated.metrics()
    phases = {key.split('phase="')[1][:-2]: value for key, value in found.items() if "nvfp4_step_seconds_total" in key}
    assert set(phases) == {"schedule", "model", "commit"}
    assert phases["model"] > 0.01
    assert simulated.metric("nvfp4_engine_steps_total") >= before + 10
    assert simulated.metric("nvfp4_stall_seconds") == 0
    pids = (found["process_resident_memory_bytes"], found["nvfp4_engine_process_resident_memory_bytes"])
    assert min(pids) > 1e6
    assert pids[0] != pids[1], "two processes"


def test_spans_are_sent_before_the_process_ends(
    launch: Launch,
    receiver: tuple[str, list[tuple[str, str, bytes]]],  # noqa: F811
) -> None:
    url, got = receiver
    server = launch("--simulate", "--otlp-traces-endpoint", f"{url}/v1/traces")
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 3}, timeout=60)
    assert answer.headers["traceresponse"].startswith("00-")
    assert server.terminate() == 0
    assert b"text_completion simulated" in b"".join(body for _, _, body in got)


async def test_top_shows_a_live_servers_load_and_obeys_its_keys(keyed: tuple[LiveServer, Path]) -> None:
    pytest.importorskip("textual.app", reason="the extra top is not installed")
    from textual.widgets import HelpPanel, Static

    from server.top.app import Top

    server, _ = keyed
    with pytest.raises(ScrapeError, match="401; give its key"):
        Server(server.url).scrape()
    threads = [threading.Thread(target=ask, args=(server, 400)) for _ in range(3)]
    app = Top(Server(server.url, KEY), interval=0.1)

    def shown(name: str) -> str:
        return str(app.query_one(f"#{name}", Static).content)

    async with app.run_test(size=(120, 45)) as pilot:
        for thread in threads:
            thread.start()
        for _ in range(200):
            await pilot.pause(0.05)
            if "running           3" in shown("load") and "0.0 tok" not in shown("throughput").split("\n")[0]:
                break
        assert "running           3" in shown("load")
        assert float(shown("throughput").split()[1]) > 0
        assert "simulated" in shown("precision")
        assert "model" in shown("phases")
        assert " ms" in shown("latency").splitlines()[2]
        assert server.url in shown("status")
        await pilot.press("p")
        assert app.paused
        assert "paused" in shown("status")
        await pilot.press("p")
        await pilot.press("question_mark")
        await pilot.pause()
        assert app.query(HelpPanel)
        await pilot.press("question_mark")
        await pilot.pause()
        assert not app.query(HelpPanel)
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        await pilot.press("q")
    assert app.return_code == 0


async def test_top_says_that_a_server_is_gone_and_goes_on(launch: Launch) -> None:
    pytest.importorskip("textual.app", reason="the extra top is not installed")
    from textual.widgets import Static

    from server.top.app import Top

    server = launch("--simulate")
    app = Top(Server(server.url), interval=0.1)
    async with app.run_test() as pilot:
        status = app.query_one("#status", Static)
        for _ in range(100):
            await pilot.pause(0.05)
            if "simulated" in str(status.content):
                break
        assert "simulated" in str(status.content)
        server.kill()
        for _ in range(100):
            await pilot.pause(0.05)
            if status.has_class("failed"):
                break
        assert "refused" in str(status.content)
