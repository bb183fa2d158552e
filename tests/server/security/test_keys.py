"""Who gets in, and what tells one API key's holder of another's. Tests bear the names of the advisories they answer."""

from __future__ import annotations

import contextlib
import hmac
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.config import ServerConfig, hash_key
from tests.fakes import FakeEngine
from tests.server.conftest import TEXT, Serve, assert_error, running_server

KEYS = (hash_key("one"), hash_key("two"))
ONE, TWO = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
HOSTS = ["localhost/health?", "localhost/health?x=", "x/health/", "a/..", "evil:99999", "[::1", "/health#", "a b"]


def walk(routes: Any) -> Iterator[Any]:
    """Every route, those of included routers too."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from walk(router.routes)


def routes(server: Any) -> list[tuple[str, str]]:
    """(method, path) of everything that is served, parameters filled in."""
    return [
        (method, route.path.replace("{response_id}", "resp_1").replace("{model_id:path}", "tiny"))
        for route in walk(server.app.routes)
        for method in sorted(route.methods)
    ]


def is_open(path: str) -> bool:
    """Probes, and the files of the page, which hold no secrets."""
    return path == "/" or path.startswith(("/health", "/ui/"))


@pytest.mark.parametrize("host", [*HOSTS, "test"])
async def test_cve_2026_48746_and_48710_no_host_header_opens_a_route(serve: Serve, host: str) -> None:
    server = await serve(api_key_hashes=KEYS)
    tried = [(method, path) for method, path in routes(server) if not is_open(path)]
    assert len(tried) > 15
    for method, path in tried:
        response = await server.http.request(method, path, headers={"host": host})
        assert response.status_code == 401, (method, path)


async def test_ghsa_h3rc_6mm3_gc2m_every_route_but_health_asks_for_the_key(serve: Serve) -> None:
    server = await serve(api_key_hashes=KEYS, enable_tokenizer_info=True)
    paths = {path for _, path in routes(server)}
    assert {"/tokenize", "/detokenize", "/tokenizer_info", "/invocations", "/metrics", "/v1/precision"} <= paths
    for method, path in routes(server):
        expected = 200 if is_open(path) else 401
        if method in ("GET", "POST", "DELETE"):
            assert (await server.http.request(method, path)).status_code == expected, (method, path)
            for variant in (f"//{path}", f"{path}/", f"/health/..{path}", path.upper(), path.replace("/", "%2f")):
                answer = await server.http.request(method, variant)
                assert is_open(path) or answer.status_code in (401, 404), (method, variant)


async def test_sglang_cve_2026_3989_and_7301_no_control_route_is_on_the_public_port(serve: Serve) -> None:
    server = await serve()
    words = ("weight", "pause", "resume", "sleep", "wake", "profile", "reset", "flush", "reload", "shutdown", "lora")
    assert not [path for _, path in routes(server) for word in words if word in path]


async def test_cve_2025_59425_every_key_is_compared_as_a_hash_in_constant_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return real(given, known)

    real = hmac.compare_digest
    monkeypatch.setattr("server.middleware.hmac.compare_digest", compare)
    server = await serve(api_key_hashes=KEYS)
    for value, status in (("one", 200), ("two", 200), ("x", 401), ("o" * 10_000, 401)):
        compared.clear()
        answer = await server.http.get("/v1/models", headers={"authorization": f"Bearer {value}"})
        assert answer.status_code == status
        assert [known for _, known in compared] == list(KEYS), "no early exit tells which key was nearly right"
        assert {len(given) for given, _ in compared} == {32}


async def test_cve_2025_46570_prefix_cache_is_salted_per_key(serve: Serve) -> None:
    server = await serve(api_key_hashes=KEYS)
    for headers in (ONE, TWO, ONE):
        await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=headers)
        await server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "cache_salt": "s"}, headers=headers)
        await server.post("/v1/embeddings", {"input": "x"}, headers=headers)
        body = {"prompt": "x", "max_tokens": 1, "use_beam_search": True, "n": 1}
        await server.post("/v1/completions", body, headers=headers)
    salts = [entry.cache_salt for entry in server.engine.submitted]
    assert len(salts) == 12
    one, two, again = salts[:4], salts[4:8], salts[8:]
    assert one == again
    assert not set(one) & set(two)
    assert one[0] != one[1], "cache_salt tells apart what has one key"
    assert [entry.tenant for entry in server.engine.submitted[:5]] == ["key-0"] * 4 + ["key-1"]


async def test_prefix_cache_is_shared_where_the_operator_says_so_and_with_one_key(serve: Serve) -> None:
    shared = await serve(api_key_hashes=KEYS, share_prefix_cache=True)
    for headers in (ONE, TWO):
        await shared.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=headers)
    assert {entry.cache_salt for entry in shared.engine.submitted} == {""}
    alone = await serve(api_key_hashes=KEYS[:1])
    await alone.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=ONE)
    assert [(entry.cache_salt, entry.tenant) for entry in alone.engine.submitted] == [("", "")]


async def test_kept_responses_are_their_keys_alone(serve: Serve) -> None:
    server = await serve(api_key_hashes=KEYS)
    made = await server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 3}, headers=ONE)
    path = f"/v1/responses/{made.json()['id']}"
    assert (await server.http.get(path, headers=ONE)).status_code == 200
    assert_error(await server.http.get(path, headers=TWO), 404, "response_id")
    assert_error(await server.http.delete(path, headers=TWO), 404, "response_id")
    assert_error(await server.http.post(f"{path}/cancel", headers=TWO), 404, "response_id")
    body = {"input": "And?", "previous_response_id": made.json()["id"], "max_output_tokens": 3}
    assert_error(await server.post("/v1/responses", body, headers=TWO), 404, "response_id")
    assert (await server.post("/v1/responses", body, headers=ONE)).status_code == 200


async def swallow(work: Callable[[], object]) -> None:
    """A server within which `work` goes wrong, and nobody minds."""
    async with running_server(FakeEngine(), ServerConfig(), TEXT):
        with contextlib.suppress(OSError):
            work()


def connect(target: tuple[str, int]) -> None:
    with socket.socket() as sock:
        sock.settimeout(0.1)
        sock.connect(target)


@pytest.mark.parametrize("target", [("192.0.2.1", 80), ("127.0.0.1", 9)])
async def test_the_ban_on_sockets_fails_a_test_that_catches_its_error(target: tuple[str, int]) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"socket.connect {target}")):
        await swallow(lambda: connect(target))
    with pytest.raises(AssertionError, match=r"getaddrinfo 'example\.invalid'"):
        await swallow(lambda: socket.getaddrinfo("example.invalid", 80))
    await swallow(lambda: None)
