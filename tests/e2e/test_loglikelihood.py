"""Scoring given continuations over HTTP, as lm-eval's local-completions does it: equal to our own scores.

lm-eval itself is not in the test extra, for it brings datasets, pyarrow, pandas and scikit-learn: its own test runs
where it is installed (`pip install .[lm-eval]`) and is skipped elsewhere. What it sends is tested everywhere.
"""

from __future__ import annotations

import openai
import pytest

from nvfp4_runtime import LLM, SamplingParams
from tests.conftest import DefaultModel
from tests.e2e.conftest import Launch, LiveServer

pytestmark = [pytest.mark.model]

MODEL = "SmolLM2-135M-Instruct-NVFP4"
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " 123"),  # what this small model says
    ("The capital of France is", " a small village in Norway"),
    ("Once upon a time", ", there was a little girl named Lily"),
    ("日本の首都は", "東京です"),
    ("2 + 2 =", " 4"),
]


@pytest.fixture(scope="module")
def server(launch: Launch, default_model: DefaultModel) -> LiveServer:
    return launch("--enable-tokenizer-info-endpoint")


@pytest.fixture(scope="module")
def own(default_model: DefaultModel) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding would say it) of each pair, from the engine in this process."""
    llm = LLM(default_model.nvfp4, num_blocks=200)
    found = []
    for context, continuation in PAIRS:
        whole, start = llm.tokenizer.encode(context + continuation), len(llm.tokenizer.encode(context))
        (scored,) = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0))
        entries = [entry for entry in scored.prompt_logprobs[start:] if entry is not None]
        assert len(entries) == len(whole) - start
        found.append((sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
    assert {greedy for _, greedy in found} == {False, True}, "or the test would not tell them apart"
    return found


def test_echoed_logprobs_are_the_engines_own(server: LiveServer, own: list[tuple[float, bool]]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for (context, continuation), (expected, greedy) in zip(PAIRS, own, strict=True):
        answers = [
            client.completions.create(
                model=MODEL, prompt=context + continuation, max_tokens=n, echo=True, logprobs=1, temperature=0
            )
            for n in (0, 1)
        ]
        start = client.completions.create(model=MODEL, prompt=context, max_tokens=1).usage.prompt_tokens  # type: ignore[union-attr]
        for answer, generated in zip(answers, (0, 1), strict=True):
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.token_logprobs is not None
            assert logprobs.top_logprobs is not None
            assert logprobs.token_logprobs[0] is None
            end = len(logprobs.token_logprobs) - generated
            scores, tops = logprobs.token_logprobs[start:end], logprobs.top_logprobs[start:end]
            # Eight decimals: the same numbers, added in the same order, after a trip through JSON.
            assert sum(scores) == pytest.approx(expected, abs=1e-8)
            assert all(score == max(top.values()) for score, top in zip(scores, tops, strict=True)) is greedy


def test_lm_evals_local_completions_gives_the_same(server: LiveServer, own: list[tuple[float, bool]]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install .[lm-eval]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=MODEL, batch_size=2, max_retries=1)
    assert model.tokenizer_backend == "remote", "found by /tokenizer_info and /tokenize"
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in own]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in own], abs=1e-8)
    until = [Instance("generate_until", {}, (PAIRS[0][0], {"until": ["\n"], "max_gen_toks": 5, "temperature": 0}), 0)]
    (text,) = model.generate_until(until, disable_tqdm=True)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert (
        text == client.completions.create(model=MODEL, prompt=PAIRS[0][0], max_tokens=5, temperature=0).choices[0].text
    )
