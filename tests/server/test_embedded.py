"""The application without a port: what a host such as Ray Serve is given."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from nvfp4_runtime.errors import ConfigError
from server.embedded import embedded_app, why_unhealthy
from tests.tiny import tiny_llama


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


async def answered(app: FastAPI, max_tokens: int) -> str:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as http:
        body = {"prompt": "x", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text


async def test_several_engines_serve_behind_it_and_show_in_its_metrics() -> None:
    app = await embedded_app(["--simulate", "--data-parallel-size", "2", "--simulate-script", "hello"])
    async with app.router.lifespan_context(app):
        engines = app.state.server.engine.engines
        assert len(engines) == 2
        assert await answered(app, 5) == "hello"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as http:
            assert 'nvfp4_replica_up{model_name="simulated",replica="1"} 1.0' in (await http.get("/metrics")).text
    assert not any(engine.alive for engine in engines)


async def test_ranks_share_its_layers_and_say_what_one_process_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the host was itself started as one of several: its place among those is not ours."""
    folder = str(tiny_llama(tmp_path / "model", seed=5, eos_token_id=None))
    flags = [folder, "--dtype", "float32", "--device", "cpu", "--threads", "1", "--num-kv-blocks", "65"]
    alone = await embedded_app(flags)
    async with alone.router.lifespan_context(alone):
        expected = await answered(alone, 12)
    monkeypatch.setenv("WORLD_SIZE", "7")
    app = await embedded_app([*flags, "--tensor-parallel-size", "2"])
    async with app.router.lifespan_context(app):
        assert app.state.server.engine.info.tensor_parallel_size == 2
        assert await answered(app, 12) == expected


async def test_ranks_without_a_model_to_share_are_refused_and_named() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size"):
        await embedded_app(["--simulate", "--tensor-parallel-size", "2"])


async def test_an_adapter_with_the_name_of_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has that name"):
        await embedded_app(["--simulate", "--served-model-name", "m", "--lora-modules", "m=/a"])


async def test_a_model_that_is_not_there_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        await embedded_app(["/no/such/folder"])
