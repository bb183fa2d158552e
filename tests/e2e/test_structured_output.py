"""Structured output on the default model: hot samples that still fit, beside free ones that do not notice."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.llm import Generation
from nvfp4_runtime.structured.spec import ReasoningSpan, StructuredSpec
from tests.conftest import DefaultModel

pytestmark = [pytest.mark.model]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["glad", "sad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
POINTS = {
    "type": "array", "minItems": 2, "maxItems": 3,
    "items": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
}  # fmt: skip
TREE = {
    "$defs": {"node": {
        "type": "object",
        "properties": {
            "leaf": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["leaf", "next"], "additionalProperties": False,
    }},
    "$ref": "#/$defs/node",
}  # fmt: skip
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"


@pytest.fixture(scope="module")
def llm(default_model: DefaultModel) -> LLM:
    return LLM(default_model.nvfp4, max_model_len=512)


def spec(kind: Any, value: Any = "", **options: Any) -> StructuredSpec:
    return StructuredSpec(kind=kind, value=value if isinstance(value, str) else json.dumps(value), **options)


def hot(structured: StructuredSpec | None, seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.5, "seed": seed, "max_tokens": 160, "structured": structured} | options)


def check_person(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "mood"]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 12
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 120
    assert found["mood"] in ("glad", "sad")


def check_points(text: str) -> None:
    found = json.loads(text)
    assert 2 <= len(found) <= 3
    assert all(type(flag) is bool and nothing is None for flag, nothing in found)


def check_tree(text: str) -> None:
    node = json.loads(text)
    while node is not None:
        assert set(node) == {"leaf", "next"}
        node = node["next"]


CASES = [
    (spec("json", PERSON), check_person),
    (spec("json", PERSON, any_whitespace=False), lambda text: (check_person(text), text.index('{"name":"'))),
    (spec("json", POINTS), check_points),
    (spec("json", TREE), check_tree),
    (spec("choice", ["red", "green", "deep blue", 'quo"te']),
     lambda text: ["red", "green", "deep blue", 'quo"te'].index(text)),
    (spec("regex", DATE), lambda text: re.fullmatch(DATE, text)[0]),
    (spec("grammar", 'root ::= "SELECT " column (", " column){0,2} " FROM t"\ncolumn ::= "a" | "b" | [x-z] [0-9]'),
     lambda text: re.fullmatch(r"SELECT ([ab]|[x-z][0-9])(, ([ab]|[x-z][0-9])){0,2} FROM t", text)[0]),
    (spec("grammar", 'start: "<" WORD ">"\nWORD: /[a-z]{1,6}/'), lambda text: re.fullmatch(r"<[a-z]{1,6}>", text)[0]),
]  # fmt: skip


def test_hot_samples_fit_their_grammar_and_stop_when_it_is_complete(llm: LLM) -> None:
    requests = [(structured, check, seed) for structured, check in CASES for seed in range(4)]
    prompts = [f"Person number {seed}:" for _, _, seed in requests]
    results = llm.generate(prompts, [hot(structured, seed) for structured, _, seed in requests])
    whole = 0
    for (_, check, _), result in zip(requests, results, strict=True):
        assert result.finish_reason in ("stop", "length"), result.error
        if result.finish_reason == "stop":
            check(result.text)
            whole += 1
    assert whole >= 0.8 * len(requests), "most of these grammars are short"


def test_json_object_cut_by_max_tokens_ends_with_length(llm: LLM) -> None:
    (result,) = llm.generate("JSON:", hot(spec("json", PERSON), 1, max_tokens=3))
    assert (result.finish_reason, len(result.token_ids)) == ("length", 3)
    assert result.text.lstrip().startswith("{")


def same(found: Generation, expected: Generation) -> bool:
    return found.token_ids == expected.token_ids and [e.logprob for e in found.logprobs] == [
        e.logprob for e in expected.logprobs
    ]


def test_free_rows_beside_constrained_ones_keep_every_bit(llm: LLM) -> None:
    if {group.backend for group in llm.info.layers} != {"cpu"}:
        pytest.skip("the plain kernels are not batch invariant: build the extension (backend cpu)")
    free = [hot(None, seed, logprobs=1, max_tokens=12, ignore_eos=True) for seed in range(8)]
    free[0] = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True)
    prompts = [f"Once upon a time, {i} " for i in range(8)]
    alone = llm.generate(prompts, free)
    tied = [hot(structured, 7, logprobs=1) for structured, _ in CASES]
    tied_prompts = [f"A date or a person {i}:" for i in range(len(tied))]
    tied_alone = [llm.generate(prompt, one)[0] for prompt, one in zip(tied_prompts, tied, strict=True)]
    mixed = llm.generate([*prompts, *tied_prompts], [*free, *tied])
    assert all(same(found, expected) for found, expected in zip(mixed, [*alone, *tied_alone], strict=True))


def test_constrained_request_survives_preemption(default_model: DefaultModel, llm: LLM) -> None:
    params = [hot(CASES[0][0], seed, max_tokens=60) for seed in range(6)]
    prompts = [f"Tell me of person {i}, at length and in order." for i in range(6)]
    expected = llm.generate(prompts, params)
    tight = LLM(default_model.nvfp4, max_model_len=96, num_blocks=14, enable_prefix_caching=False)
    found = tight.generate(prompts, params)
    assert tight.engine.scheduler.num_preemptions > 0
    if {group.backend for group in llm.info.layers} == {"cpu"}:
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one in found:
        if one.finish_reason == "stop":
            check_person(one.text)


def test_logprobs_are_over_what_the_grammar_allows(llm: LLM) -> None:
    (result,) = llm.generate("Answer:", hot(spec("choice", ["yes", "no"]), 3, logprobs=20))
    first = result.logprobs[0]
    finite = [logprob for _, logprob in first.top if logprob > -1e30]
    assert len(finite) < 10, "yes and no begin with few tokens"
    assert sum(2.718281828**logprob for logprob in finite) == pytest.approx(1, abs=1e-4)


def test_logprobs_may_ask_for_more_tokens_than_are_allowed(llm: LLM) -> None:
    (result,) = llm.generate("Answer:", SamplingParams(temperature=0, logprobs=20, structured=spec("choice", ["yes"])))
    assert result.text == "yes"
    assert result.finish_reason == "stop"


def test_greedy_constrained_output_is_the_likeliest_allowed(llm: LLM) -> None:
    structured = spec("choice", ["Paris", "London"])
    (result,) = llm.generate(
        "The capital of France is the city of", SamplingParams(temperature=0, structured=structured)
    )
    assert (result.text, result.finish_reason) == ("Paris", "stop")


def test_grammar_begins_after_the_reasoning(llm: LLM) -> None:
    span = ReasoningSpan("<t>", "e", True)
    params = hot(spec("regex", "[0-9]{3}", reasoning=span), 5, max_tokens=100)
    for result in llm.generate(["Think:"] * 3, params):
        assert result.finish_reason == "stop", result.text
        assert re.search(r"e[^e]*[0-9]{3}$", result.text)


def test_what_forbids_every_allowed_token_ends_that_request_alone(llm: LLM) -> None:
    ids = {llm.tokenizer.encode(text)[0] for text in ("yes", "y", "ye")}
    params = [
        hot(spec("choice", ["yes"]), 1, logit_bias=dict.fromkeys(ids, -100.0)),
        hot(spec("choice", ["yes"]), 1, stop_token_ids=tuple(ids), min_tokens=3),
        hot(None, 1, max_tokens=4, ignore_eos=True),
    ]
    biased, stopped, free = llm.generate(["Say:"] * 3, params)
    assert biased.text == "yes", "a bias is finite"
    assert stopped.finish_reason == "error"
    assert "min_tokens" in (stopped.error or "")
    assert (free.finish_reason, len(free.token_ids)) == ("length", 4)
