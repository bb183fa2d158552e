"""LoRA adapters over HTTP: chosen by `model`, listed, counted; flags that name none are refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from nvfp4_runtime.errors import ConfigError
from server.cli import main
from server.configs import adapter_flags, engine_config
from tests import tiny
from tests.adapters import random_matrices, write_adapter
from tests.e2e.conftest import Launch
from tests.server.test_cli import serve_arguments

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["a=/x"], [("a", "/x")]),
        (["a=/x=y", "b=z"], [("a", "/x=y"), ("b", "z")]),
        (['{"name": "a", "path": "/x", "base_model_name": "b"}'], [("a", "/x")]),
    ],
)
def test_flags_are_read_in_both_spellings(values: list[str], found: list[tuple[str, str]]) -> None:
    assert [(adapter.name, adapter.path) for adapter in adapter_flags(values)] == found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a"], "expected name=path"),
        (["=x"], "expected name=path"),
        (["a="], "expected name=path"),
        (["{"], "it is no JSON"),
        (['{"name": 1, "path": "x"}'], "expected name=path"),
        (['{"name": "a", "path": "x", "rank": 2}'], "unknown rank"),
        (["a=x", "a=y"], "'a' is given twice"),
    ],
)
def test_flags_that_name_no_adapter_are_refused(values: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapter_flags(values)


def test_an_adapter_with_the_model_s_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--simulate", "--port", "0", "--served-model-name", "m", "--lora-modules", "m=x"]
    assert main(arguments) == 1
    assert "the model has that name" in capsys.readouterr().err


def test_the_flag_may_repeat_and_take_several() -> None:
    config = engine_config(serve_arguments("--simulate", "--lora-modules", "a=1", "b=2", "--lora-modules", "c=3"), "")
    assert [adapter.name for adapter in config.adapters] == ["a", "b", "c"]


async def test_every_endpoint_chooses_the_adapter_by_model(launch: Launch) -> None:
    server = launch("--simulate", "--served-model-name", "base", "--lora-modules", "one=/a", "two=/b")
    messages = [{"role": "user", "content": "Hi"}]
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert [*cards] == ["base", "one", "two"]
        assert (cards["one"]["parent"], cards["one"]["root"]) == ("base", "/a")
        assert cards["base"]["parent"] is None
        assert (await http.get("/v1/models/two")).json()["id"] == "two"
        bodies = {
            "/v1/completions": {"prompt": "Hi", "max_tokens": 8, "temperature": 0},
            "/v1/chat/completions": {"messages": messages, "max_tokens": 8, "temperature": 0},
            "/v1/responses": {"input": "Hi", "max_output_tokens": 8, "temperature": 0, "store": False},
            "/v1/messages": {"messages": messages, "max_tokens": 8, "temperature": 0},
        }
        for path, body in bodies.items():
            answers = {}
            for name in ("base", "one", "two"):
                response = await http.post(path, json={**body, "model": name})
                assert response.status_code == 200, response.text
                assert response.json()["model"] == name
                for field in ("id", "model", "created", "created_at", "completed_at"):
                    answers.setdefault(name, response.json()).pop(field, None)
            texts = [json.dumps(answers[name].get("choices") or answers[name].get("content")) for name in answers]
            if path != "/v1/responses":  # its items have ids of their own
                assert len(set(texts)) == 3, f"{path}: adapters change the simulated tokens"
        refused = await http.post("/v1/completions", json={"prompt": "Hi", "model": "three"})
        assert refused.status_code == 404
        beams = {"prompt": "Hi", "max_tokens": 3, "n": 2, "use_beam_search": True, "model": "one"}
        assert (await http.post("/v1/completions", json=beams)).status_code == 200


async def test_metrics_say_which_adapters_run(launch: Launch) -> None:
    server = launch("--simulate", "--simulate-step-seconds", "0.02", "--lora-modules", "one=/a", "two=/b")
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:

        def sample(text: str) -> list[str]:
            return [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]

        body = {"prompt": "Hi", "max_tokens": 100}
        running = [asyncio.create_task(http.post("/v1/completions", json={**body, "model": m})) for m in ("one", "two")]
        for _ in range(100):
            await asyncio.sleep(0.02)
            (line,) = sample((await http.get("/metrics")).text)
            if 'running_lora_adapters="one,two"' in line:
                break
        assert 'max_lora="2"' in line
        assert 'running_lora_adapters="one,two"' in line
        await asyncio.gather(*running)
        (line,) = sample((await http.get("/metrics")).text)
        assert 'running_lora_adapters=""' in line


def test_a_real_model_serves_its_adapters(launch: Launch, tmp_path: Path) -> None:
    config = tiny.llama_config(dtype="bfloat16")
    tensors = tiny.random_tensors(config)
    model = tiny.write_modelopt(tmp_path / "model", config, tensors)
    adapter = write_adapter(tmp_path / "adapter", random_matrices(tensors, TARGETS, 8, 1), 8)
    server = launch(str(model), "--num-kv-blocks", "64", "--lora-modules", f"tuned={adapter}")
    assert "tuned (LoRA, rank 8)" in server.output()
    texts = set()
    for name in ("model", "tuned", "model", "tuned"):
        body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, "model": name, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        texts.add((name, answer["choices"][0]["text"]))
    assert len(texts) == 2
    assert len({text for _, text in texts}) == 2
