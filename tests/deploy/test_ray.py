"""The Ray Serve application on a local Ray, over the simulated engine: streams, a replica that dies, scaling."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.cli import _parser
from tests.deploy.manifests import DEPLOY, ROOT
from tests.tiny import tiny_llama

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed: pip install 'ray[serve]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOLDER = DEPLOY / "ray"
FLAGS = ["--simulate", "--simulate-step-seconds", "0.02", "--max-num-seqs", "8"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(FOLDER)])
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    sys.path.insert(0, str(FOLDER))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        sys.path.remove(str(FOLDER))
        serve.shutdown()
        ray.shutdown()


def run(flags: list[str] | None = None, **options: Any) -> None:
    import nvfp4_ray

    deployment = nvfp4_ray.Replica.options(ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=8, **options)
    serve.run(deployment.bind(flags or FLAGS), name="nvfp4", route_prefix="/")


def replicas() -> int:
    (deployment,) = serve.status().applications["nvfp4"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def processes(part: str) -> set[int]:
    """Ids of processes whose command line holds `part`, and that are not zombies."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                part in (folder / "cmdline").read_text().replace("\0", " ")
                and "\nState:\tZ" not in (folder / "status").read_text()
            ):
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        children = {int(word) for word in file.read_text().split()}
        found |= children.union(*map(descendants, children))
    return found


async def until(what: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, "not within the time"
        await asyncio.sleep(0.1)
    return time.monotonic() - started


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "simulated",
        "prompt": "hello",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    } | more


async def stream(http: httpx.AsyncClient, max_tokens: int, arrivals: list[float] | None = None) -> str | None:
    """The text, or None where the stream broke off."""
    text = []
    try:
        async with http.stream("POST", "/v1/completions", json=body(max_tokens, stream=True)) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return "".join(text)
                if line.startswith("data: "):
                    chunk = json.loads(data)
                    if "error" in chunk:
                        return None
                    text.append(chunk["choices"][0]["text"])
                    if arrivals is not None:
                        arrivals.append(time.monotonic())
    except httpx.TransportError:
        return None
    return None


async def test_two_replicas_stream_under_load_what_one_answers_whole(http: httpx.AsyncClient) -> None:
    run(num_replicas=2)
    whole = (await http.post("/v1/completions", json=body(50))).json()["choices"][0]["text"]
    arrivals: list[float] = []
    started = time.monotonic()
    # 16 at once: 8 in each engine, so that one batch suffices only where both are used
    texts = await asyncio.gather(stream(http, 50, arrivals), *(stream(http, 50) for _ in range(15)))
    assert texts == [whole] * 16
    assert arrivals[-1] - arrivals[0] > 0.5 * 50 * 0.02, "token by token, not all at the end"
    assert arrivals[0] - started < arrivals[-1] - arrivals[0], "and from the start"
    assert len(processes("ray::ServeReplica:nvfp4")) == 2
    refused = await http.post("/v1/completions", json=body(5, temperature=-1))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"


async def test_a_client_that_leaves_frees_its_request(http: httpx.AsyncClient) -> None:
    run(num_replicas=1)
    await until(lambda: replicas() == 1, 60)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await stream(http, 4000)

    async def idle() -> bool:
        return (await http.get("/load")).json() == {"server_load": 0}

    for _ in range(100):
        if await idle():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the request still runs")


async def test_a_killed_replica_costs_its_own_streams_and_is_replaced(http: httpx.AsyncClient) -> None:
    run(num_replicas=2)
    await until(lambda: replicas() == 2 and len(processes("ray::ServeReplica:nvfp4")) == 2, 60)
    streams = [asyncio.create_task(stream(http, 200)) for _ in range(12)]
    await asyncio.sleep(1)
    victim, other = sorted(processes("ray::ServeReplica:nvfp4"))
    engine = descendants(victim) & processes("nvfp4_runtime.engine")
    assert engine
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    texts = await asyncio.gather(*streams)
    broken = texts.count(None)
    assert 0 < broken < 12, "those of one replica, not all"
    assert len({text for text in texts if text is not None}) == 1
    answers = [(await http.post("/v1/completions", json=body(5))).status_code for _ in range(5)]
    assert answers == [200] * 5, "the other one serves"
    await until(lambda: replicas() == 2 and processes("ray::ServeReplica:nvfp4") - {victim, other} != set(), 60)
    print(f"{broken} of 12 streams broken, replaced after {time.monotonic() - killed:.1f} s")
    await until(lambda: not engine & processes("nvfp4_runtime.engine"), 10)  # no engine outlives its replica


async def test_one_replica_has_several_engines_and_ranks_and_all_end_with_it(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    folder = str(tiny_llama(tmp_path / "model", seed=5, eos_token_id=None))
    flags = [folder, "--dtype=float32", "--device=cpu", "--threads=1", "--num-kv-blocks=65", "--no-self-test"]
    texts = []
    for more in ([], ["--tensor-parallel-size=2", "--data-parallel-size=2"]):
        run([*flags, "--served-model-name=simulated", *more], num_replicas=1)
        await until(lambda: replicas() == 1 and len(processes("ray::ServeReplica:nvfp4")) == 1, 60)
        texts += await asyncio.gather(*(stream(http, 20) for _ in range(4)))
    assert len(set(texts)) == 1
    assert texts[0]
    (replica,) = processes("ray::ServeReplica:nvfp4")
    started = {part: descendants(replica) & processes(f"nvfp4_runtime.engine.{part}") for part in ("core", "rank")}
    assert {part: len(pids) for part, pids in started.items()} == {"core": 2, "rank": 2}
    os.kill(replica, signal.SIGKILL)
    await until(lambda: not set.union(*started.values()) & processes("nvfp4_runtime.engine"), 10)


async def test_replicas_follow_the_requests_there_are(http: httpx.AsyncClient) -> None:
    scaling = {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4,
        "upscale_delay_s": 1, "downscale_delay_s": 2,
    }  # fmt: skip
    run(num_replicas="auto", autoscaling_config=scaling)
    await until(lambda: replicas() == 1, 60)
    ended = False

    async def client() -> None:
        while not ended:
            assert await stream(http, 50) is not None

    clients = [asyncio.create_task(client()) for _ in range(12)]
    up = await until(lambda: replicas() == 3, 90)
    ended = True
    await asyncio.gather(*clients)
    down = await until(lambda: replicas() == 1, 90)
    print(f"1 to 3 replicas after {up:.1f} s of load, back after {down:.1f} s without")


def test_the_settings_of_the_file_are_ones_that_ray_and_serve_know() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "config.yaml").read_text()))
    (application,) = schema.applications
    (deployment,) = application.deployments
    module, _, name = application.import_path.partition(":")
    assert name in (FOLDER / f"{module}.py").read_text()
    args = _parser()[0].parse_args(["serve", *application.args["flags"]])
    assert deployment.max_ongoing_requests == args.max_num_seqs
    assert deployment.autoscaling_config["target_ongoing_requests"] < args.max_num_seqs
    assert schema.http_options.request_timeout_s > args.request_timeout
