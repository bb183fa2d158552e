"""From a plain folder to answers over HTTP with the command alone: quantize, inspect, serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import REPOSITORY, Launch
from tests.tiny import tiny_llama

PROMPT = list(range(20, 60))


def nvfp4(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    plain = folder / "plain"
    plain.mkdir()
    tiny_llama(plain)
    assert "layers quantised" in nvfp4("quantize", str(plain), str(folder / "nvfp4"))
    return folder / "nvfp4"


def test_quantised_folder_can_be_inspected(quantised: Path) -> None:
    assert "NVFP4" in nvfp4("inspect", str(quantised))
    report = json.loads(nvfp4("inspect", "--json", str(quantised)))
    assert report["architecture"] == "LlamaForCausalLM"
    assert any(group["stored"] == "nvfp4" for group in report["groups"])


def test_served_greedy_tokens_are_those_of_the_offline_engine(quantised: Path, launch: Launch) -> None:
    from nvfp4_runtime import LLM, SamplingParams

    llm = LLM(quantised, threads=1, num_blocks=64)
    (offline,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    server = launch(str(quantised), "--threads", "1", "--num-kv-blocks", "64", "--served-model-name", "tiny")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == offline.token_ids

    scored = body | {"echo": True, "logprobs": 2, "max_tokens": 1}
    logprobs = httpx.post(f"{server.url}/v1/completions", json=scored, timeout=60).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(PROMPT) + 1
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])

    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert card["numerics"] in ("w4a16", "w4a4")
    assert any(group["stored"] == "nvfp4" for group in card["quantization"])
    assert server.metric("vllm:generation_tokens_total") == 12 + 1
    phases = {key.partition('phase="')[2][:-2] for key in server.metrics() if key.startswith("nvfp4_startup_seconds{")}
    engine = {"import", "checkpoint", "weights", "kv_cache", "warm_up", "self_test", "engine_total"}
    assert phases == engine | {"web", "tokenizer", "ready"}
    server.assert_idle()
    assert server.terminate() == 0
    assert "leaked" not in server.log(), "nanobind tells of kernels that outlive the engine"
