"""Round the endpoints: request ids, key, body limit, errors of the HTTP layer, models, health, version."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime import __version__
from server.config import hash_key
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, assert_error, events

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/health", 200), ("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("GET", "/metrics", 200)],
)
async def test_every_answer_has_a_request_id(serve: Serve, method: str, path: str, status: int) -> None:
    server = await serve()
    response = await server.http.request(method, path)
    assert response.status_code == status
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    echoed = await server.http.request(method, path, headers={"x-request-id": "abc-1:2.3_4"})
    assert echoed.headers["x-request-id"] == "abc-1:2.3_4"


@pytest.mark.parametrize("value", ["a b", "x" * 129, "", "é", '"', "a;b"])
async def test_request_ids_that_are_not_plain_are_replaced(serve: Serve, value: str) -> None:
    server = await serve()
    response = await server.http.get("/health", headers={"x-request-id": value.encode()})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_errors_of_the_http_layer_are_openai_objects(serve: Serve) -> None:
    server = await serve()
    missing = await server.http.get("/nowhere")
    assert_error(missing, 404, None, "Not Found")
    assert missing.json()["error"]["type"] == "Not Found"
    wrong = await server.http.get("/v1/completions")
    assert_error(wrong, 405, None)
    assert wrong.headers["allow"] == "POST"


async def test_unexpected_error_is_a_500_without_details(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await serve()

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(server.engine, "submit", broken)
    response = await server.complete()
    assert_error(response, 500, None)
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


async def test_body_over_the_limit_is_a_413(serve: Serve) -> None:
    server = await serve(max_body_bytes=1000)
    declared = await server.complete(prompt="x" * 1000)
    assert_error(declared, 413, None, "1000 bytes")
    assert declared.headers["x-request-id"]

    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    undeclared = await server.http.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert_error(undeclared, 413, None, "1000 bytes")
    assert (await server.complete(prompt="x" * 100)).status_code == 200


async def test_key_is_asked_for_on_every_route_but_health(serve: Serve) -> None:
    server = await serve(api_key_hashes=(hash_key("one"), hash_key("two")))
    paths = {path for path in server.app.openapi()["paths"] if not path.startswith("/health")}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/version", "/ping"} <= paths
    for path in [*paths, "/docs", "/openapi.json", "/nowhere"]:
        for method in ("GET", "POST"):
            response = await server.http.request(method, path)
            if path.startswith("/v1/messages"):
                assert (response.status_code, response.json()["type"]) == (401, "error")
            else:
                assert_error(response, 401, None)
    assert (await server.http.get("/health")).status_code == 200


@pytest.mark.parametrize("value", ["Bearer one", "bearer two", "Bearer  one "])
async def test_right_key_opens(serve: Serve, value: str) -> None:
    server = await serve(api_key_hashes=(hash_key("one"), hash_key("two")))
    assert (await server.http.get("/v1/models", headers={"authorization": value})).status_code == 200


@pytest.mark.parametrize("value", ["Bearer", "Bearer x", "one", "Basic one", "Bearer one two", "Bearer One", ""])
async def test_wrong_key_does_not(serve: Serve, value: str) -> None:
    server = await serve(api_key_hashes=(hash_key("one"), hash_key("two")))
    assert_error(await server.http.get("/v1/models", headers={"authorization": value}), 401, None)


@pytest.mark.parametrize("host", ["localhost/health?", "x/health", "health", "a b", "evil:99999", "/health#"])
async def test_host_headers_do_not_matter(serve: Serve, host: str) -> None:
    server = await serve(api_key_hashes=(hash_key("one"),))
    assert (await server.http.get("/v1/models", headers={"host": host})).status_code == 401
    assert (await server.http.get("/health", headers={"host": host})).status_code == 200


async def test_models_say_numerics_and_quantisation(serve: Serve) -> None:
    server = await serve()
    body = (await server.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "tiny-alias"]
    card = body["data"][0]
    assert card["object"] == "model"
    assert (card["max_model_len"], card["root"], card["parent"]) == (256, "/models/fake", None)
    assert card["permission"][0]["object"] == "model_permission"
    assert (card["numerics"], card["numerics_reason"]) == ("w4a16", "auto: what cpu runs fastest")
    assert len(card["quantization"]) == 2, "only what is stored, not attention or norms"
    assert card["quantization"][1] == {
        "layers": "lm_head", "count": 1, "stored": "bf16", "bits_per_weight": 16.0, "kernel": "reference",
        "numerics": "dense", "reason": "cpu: not built",
    }  # fmt: skip
    assert (await server.http.get("/v1/models/tiny-alias")).json()["id"] == "tiny-alias"
    assert_error(await server.http.get("/v1/models/a/b"), 404, "model", "`a/b`")


async def test_health_is_empty_200_and_503_once_the_engine_is_dead(serve: Serve) -> None:
    server = await serve()
    for path in ("/health", "/ping"):
        response = await server.http.get(path)
        assert (response.status_code, response.content) == (200, b"")
    server.engine.die("out of luck")
    assert_error(await server.http.get("/health"), 503, None, "out of luck")
    assert_error(await server.complete(), 503, None, "out of luck")
    assert_error(await server.complete(stream=True), 503, None, "out of luck")


async def test_health_is_503_while_draining(serve: Serve) -> None:
    server = await serve()
    server.app.state.server.draining = True
    assert_error(await server.http.get("/health"), 503, None, "shutting down")


async def test_version(serve: Serve) -> None:
    assert (await (await serve()).http.get("/version")).json() == {"version": __version__, "device": "cpu"}


async def test_engine_death_before_the_first_token_is_a_503_after_it_an_error_event(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.01))
    server.engine.gate.clear()
    waiting = asyncio.create_task(server.complete(stream=True))
    while not server.engine.submitted:
        await asyncio.sleep(0.001)
    server.engine.die()
    assert_error(await waiting, 503, None)

    server = await serve(FakeEngine(step_seconds=0.01))
    running = asyncio.create_task(server.complete(stream=True, max_tokens=200))
    await asyncio.sleep(0.1)
    server.engine.die()
    chunks = events(await running)
    assert chunks[0]["choices"]
    assert chunks[-1]["error"]["code"] == 503
    plain = await serve(FakeEngine(step_seconds=0.01))
    running = asyncio.create_task(plain.chat())
    await asyncio.sleep(0.05)
    plain.engine.die()
    assert_error(await running, 503, None)


async def test_error_of_one_request_is_a_500_that_says_what_happened(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.01))
    for body in ({}, {"n": 3}):
        running = asyncio.create_task(server.complete(max_tokens=200, **body))
        await asyncio.sleep(0.05)
        server.engine.fail("the model's output was not finite")
        assert_error(await running, 500, None, "not finite")
        assert server.engine.running == 0


async def test_openapi_documents_bodies_and_refusals(serve: Serve) -> None:
    document = (await (await serve()).http.get("/openapi.json")).json()
    paths = document["paths"]
    for path in ("completions", "chat/completions", "responses", "messages", "embeddings"):
        operation = paths[f"/v1/{path}"]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert {"200", "400", "404", "429", "503"} <= set(operation["responses"])
    statuses = {status for operations in paths.values() for each in operations.values() for status in each["responses"]}
    assert "422" not in statuses
    error = paths["/v1/messages"]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
    assert error["properties"]["type"] == {"const": "error"}


async def test_app_closes_its_engine_when_it_ends(serve: Serve) -> None:
    server = await serve()
    async with server.app.router.lifespan_context(server.app):
        assert not server.engine.closed
    assert server.engine.closed


async def test_no_prompt_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = await serve()
    caplog.set_level("DEBUG")
    await server.complete(prompt="a secret prompt", vendor_field="x")
    await server.chat(messages=[{"role": "user", "content": "a secret prompt"}])
    logged = [record for record in caplog.records if record.name.startswith(("server", "nvfp4"))]
    assert logged
    assert all("secret" not in record.getMessage() for record in logged)


def test_server_process_never_imports_torch() -> None:
    script = (
        "import sys\n"
        "from tests.fakes import FakeEngine\n"
        "from nvfp4_runtime.text.processor import TextProcessor\n"
        "from server.app import create_app\n"
        "from server.config import ServerConfig\n"
        "import server.cli, server.serve\n"
        "from nvfp4_runtime.quantize.default_model import cached_default_model\n"
        "import asyncio\n"
        "async def main():\n"
        "    create_app(FakeEngine(), TextProcessor.simulated(), ServerConfig())\n"
        "asyncio.run(main())\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "importing torch would cost the server seconds of start-up and 200 MB"
