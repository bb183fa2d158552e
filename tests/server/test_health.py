"""The three probes, and what is refused while the server stops. Nothing here waits for an engine."""

from __future__ import annotations

import asyncio

import pytest

from nvfp4_runtime.engine.messages import StepStats
from tests.server.conftest import Serve, assert_error

PROBES = ("/health/live", "/health/ready", "/health")


async def statuses(server: object) -> tuple[int, ...]:
    return tuple([(await server.http.get(path)).status_code for path in PROBES])  # type: ignore[attr-defined]


async def test_a_server_that_works_is_live_and_ready(serve: Serve) -> None:
    server = await serve()
    assert await statuses(server) == (200, 200, 200)
    assert (await server.http.get("/health/ready")).json() == {"status": "ready"}
    assert (await server.http.get("/health/live")).json() == {"status": "live"}


async def test_without_an_engine_it_is_live_and_says_why_it_is_not_ready(serve: Serve) -> None:
    server = await serve()
    server.engine.die("it is being started again")
    assert await statuses(server) == (200, 503, 503)
    assert_error(await server.http.get("/health/ready"), 503, None, "being started again")


@pytest.mark.parametrize(("stalled", "expected"), [(29, (200, 200, 200)), (31, (200, 503, 503)), (61, (503, 503, 503))])
async def test_a_stall_costs_readiness_and_at_twice_the_limit_liveness(
    serve: Serve, stalled: float, expected: tuple[int, ...]
) -> None:
    server = await serve()
    server.engine.stalled_seconds = stalled
    assert await statuses(server) == expected
    if expected[1] == 503:
        assert_error(await server.http.get("/health/ready"), 503, None, f"no progress for {stalled} s")


async def test_a_full_queue_costs_readiness_only(serve: Serve) -> None:
    server = await serve()
    bound = server.engine.info.max_queued_requests
    server.engine.stats = StepStats(8, bound, 0, 64, 64)
    assert await statuses(server) == (200, 503, 200)
    server.engine.stats = StepStats(8, bound - 1, 0, 64, 64)
    assert await statuses(server) == (200, 200, 200)


async def test_as_many_prompt_tokens_waiting_as_may_cost_readiness_only(serve: Serve) -> None:
    server = await serve()
    server.engine.admission.admit("long", "", server.engine.info.max_queued_tokens)
    assert await statuses(server) == (200, 503, 200)
    assert_error(await server.http.get("/health/ready"), 503, None, "prompt tokens wait")
    server.engine.admission.started("long")
    assert await statuses(server) == (200, 200, 200)


async def test_a_server_told_to_stop_takes_requests_until_it_refuses_and_answers_probes_to_the_end(
    serve: Serve,
) -> None:
    server = await serve()
    state = server.app.state.server
    state.draining = True
    assert await statuses(server) == (200, 503, 503)
    assert (await server.complete()).status_code == 200
    state.refusing = True
    refused = await server.complete()
    assert_error(refused, 503, None, "shutting down")
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) >= 1
    assert await statuses(server) == (200, 503, 503)
    assert (await server.http.get("/metrics")).status_code == 200


async def test_an_error_of_a_kind_is_told_as_the_type_of_the_body(serve: Serve) -> None:
    server = await serve()
    server.engine.gate.clear()
    asking = asyncio.create_task(server.complete())
    while not server.engine.running:
        await asyncio.sleep(0)
    server.engine.fail("the model's output was not finite", "model_output_invalid")
    response = await asking
    assert_error(response, 500, None, "not finite")
    assert response.json()["error"]["type"] == "model_output_invalid"
