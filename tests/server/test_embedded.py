"""The application without a port: what a host such as Ray Serve is given."""

from __future__ import annotations

import httpx
import pytest

from nvfp4_runtime.errors import ConfigError
from server.cli import _parser
from server.embedded import embedded_app, why_unhealthy


async def test_it_answers_as_serve_would_and_ends_its_engine_with_its_lifespan() -> None:
    app = await embedded_app(["--simulate", "--served-model-name", "m", "--simulate-script", "hello"])
    async with app.router.lifespan_context(app):
        assert why_unhealthy(app) is None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as http:
            models = (await http.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["m"]
            body = {"model": "m", "prompt": "x", "max_tokens": 5, "temperature": 0}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == "hello"
    assert not app.state.server.engine.alive
    assert why_unhealthy(app) is not None


@pytest.mark.parametrize(
    "flags", [["--port", "9000"], ["--host", "0.0.0.0"], ["--metrics-port", "9100"], ["--drain-delay", "1"]]
)
async def test_a_flag_of_the_port_is_refused_and_named(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        await embedded_app(["--simulate", *flags])


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--data-parallel-size"])
async def test_what_it_does_not_start_is_refused_and_not_left_out_silently(flag: str) -> None:
    if flag not in _parser()[1].format_help():
        pytest.skip(f"serve has no {flag} yet")
    with pytest.raises(ConfigError, match=flag):
        await embedded_app(["--simulate", flag, "2"])


async def test_a_model_that_is_not_there_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        await embedded_app(["/no/such/folder"])
