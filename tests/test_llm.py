"""The offline door: batches of any size, one SamplingParams or many, errors before anything runs, no leftovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.errors import ConfigError, InvalidParameterError, PromptTooLongError
from tests.tiny import tiny_nvfp4_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tiny_nvfp4_llama(tmp_path_factory.mktemp("llm") / "model")
    return LLM(folder, num_blocks=65, max_num_seqs=3, max_queued_requests=2, backend="reference")


def test_more_prompts_than_the_queue_holds_are_all_completed_in_order(llm: LLM) -> None:
    prompts = [[i + 1, 7, 9] for i in range(20)]
    results = llm.generate(prompts, GREEDY)
    assert [result.prompt_token_ids for result in results] == prompts
    assert all(len(result.token_ids) == 4 and result.finish_reason == "length" for result in results)


def test_text_prompts_and_one_params_each(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=1) for n in (1, 3)]
    one, three = llm.generate(["ab", "cd"], params)
    assert (len(one.token_ids), len(three.token_ids)) == (1, 3)
    assert [entry.token_id for entry in three.logprobs] == three.token_ids
    assert llm.generate("ab", params[0])[0].token_ids == one.token_ids
    assert llm.generate(one.prompt_token_ids, params[0])[0].token_ids == one.token_ids


def test_one_impossible_prompt_refuses_the_batch_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.generate([[1], [1] * 5000], GREEDY)
    with pytest.raises(InvalidParameterError, match="temperature"):
        llm.generate([[1]], SamplingParams(temperature=9.0))
    with pytest.raises(ValueError, match="as many params"):
        llm.generate([[1], [2]], [GREEDY])
    assert not llm.engine.has_work


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[1, 2]], GREEDY)[0].token_ids
    step = llm.engine.step
    calls = iter([step, step])

    def interrupted() -> object:
        try:
            return next(calls)()
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[3, 4]] * 6, GREEDY)
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_used == 0
    assert llm.generate([[1, 2]], GREEDY)[0].token_ids == expected


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    folder = tiny_nvfp4_llama(tmp_path / "m")
    with pytest.raises(TypeError, match="no_such_option"):
        LLM(folder, no_such_option=1)
    with pytest.raises(ConfigError, match="backend"):
        LLM(folder, backend="quantum")
