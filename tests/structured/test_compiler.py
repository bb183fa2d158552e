"""GrammarCompiler and GrammarState over a vocabulary of bytes: what each kind allows, the cache, hostile grammars."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured import worker
from nvfp4_runtime.structured.bench_cases import hostile
from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.spec import ReasoningSpan, StructuredSpec
from nvfp4_runtime.structured.worker import GrammarTrial

pytest.importorskip("llguidance", reason="package llguidance is not installed")

EOS, OTHER_EOS, THINK = 256, 257, 258
BYTES = tuple(bytes([i]) for i in range(256))
VOCABULARY = Vocabulary(
    259, (EOS, OTHER_EOS), tokens=(*BYTES, b"<|end|>", b"<|over|>", b"<think>"), special=(EOS, OTHER_EOS)
)
SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer"}, "o": {"enum": ["x", "y"]}},
    "required": ["n", "o"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, GrammarTrial(VOCABULARY))


def spec(kind: Any, value: Any = "", **options: Any) -> StructuredSpec:
    return StructuredSpec(kind=kind, value=value if isinstance(value, str) else json.dumps(value), **options)


def allowed(state: GrammarState) -> set[int]:
    words = np.zeros(state.num_words, dtype=np.int32)
    state.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def says(state: GrammarState, text: str) -> str:
    """How far the grammar follows: "complete", "open", "may end", or the first character it refuses."""
    for byte in text.encode():
        if byte not in allowed(state):
            return f"refused {chr(byte)}"
        state.accept(byte)
        assert state.error is None
    if state.complete:
        return "complete"
    return "may end" if EOS in allowed(state) else "open"


TAG = {"type": "structural_tag", "triggers": ["<f="],
       "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("structured", "text", "outcome"),
    [
        (spec("json_object"), '{"a": [1, {"b": null}]}', "complete"),
        (spec("json_object"), "[", "refused ["),
        (spec("json", SCHEMA), '{"n": 1, "o": "x"}', "complete"),
        (spec("json", SCHEMA), '{"o"', "refused o"),
        (spec("json", SCHEMA), '{"n": 1, "o": "z', "refused z"),
        (spec("json", SCHEMA, any_whitespace=False), '{"n": ', "refused  "),
        (spec("json", SCHEMA, any_whitespace=False), '{"n":-5,"o":"y"}', "complete"),
        (spec("json", SCHEMA, whitespace_pattern=" "), '{ "n" : 1', "open"),
        (spec("json", {"type": "object", "properties": {"a": {}}}, closed_objects=True), '{"b', "refused b"),
        (spec("json", "true"), "[1]", "complete"),
        (spec("choice", ["yes", "yes, but", 'q"\\']), "yes", "may end"),
        (spec("choice", ["yes", 'q"\\']), 'q"\\', "complete"),
        (spec("choice", ["a.b", "a/b", "(c\n|d)", "[x]{2}^$"]), "(c\n|d)", "complete"),
        (spec("choice", ["a.b", "a/b"]), "axb", "refused x"),
        (spec("choice", ["é日", "a/b"]), "é日", "complete"),
        (spec("regex", r"[0-9]{2}/é\n?"), "12/é\n", "complete"),
        (spec("regex", "a|b"), "c", "refused c"),
        (spec("grammar", 'root ::= "a"+ [^a]'), "aab", "complete"),
        (spec("grammar", 'start: "a" NUM\nNUM: /[0-9]+/'), "a12", "may end"),
        (spec("structural_tag", TAG), "free < text <f=a>12</f> and <more", "may end"),
        (spec("structural_tag", TAG), "free <f=b", "refused b"),
        (spec("structural_tag", TAG), "<f=a>x", "refused x"),
        (spec("structural_tag", {"format": {
            "type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}}),
         "<a>x</b></a>", "complete"),
        (spec("structural_tag", {"format": {"type": "sequence", "elements": [
            {"type": "const_string", "value": "n="}, {"type": "or", "elements": [
                {"type": "regex", "pattern": "[0-9]"}, {"type": "grammar", "grammar": 'root ::= "x" "y"'}]}]}}),
         "n=xy", "complete"),
    ],
)  # fmt: skip
def test_grammar_allows_this_much(
    compiler: GrammarCompiler, structured: StructuredSpec, text: str, outcome: str
) -> None:
    assert says(compiler.state(structured), text) == outcome


@pytest.mark.parametrize(
    ("structured", "word"),
    [
        (spec("regex", "("), "cannot be used"), (spec("regex", "(?=a)b"), "cannot be used"),
        (spec("json", "{"), "not valid JSON"), (spec("json", "5"), "JSON schema"),
        (spec("json", {"type": "nothing"}), "cannot be used"), (spec("json", {"$ref": "#/none"}), "cannot be used"),
        (spec("json", {"$ref": "http://127.0.0.1:9/x"}), "cannot be used"),
        (spec("grammar", "start: ("), "cannot be used"),
        (spec("grammar", "root ::= missing"), "cannot be used"), (spec("grammar", 'a ::= "b"'), "root"),
        (spec("structural_tag", {}), "structures"), (spec("structural_tag", "[]"), "object"),
        (spec("structural_tag", {"format": {"type": "qwen_xml_parameter"}}), "not supported"),
        (spec("structural_tag", {"structures": [{"begin": "<a"}], "triggers": []}), "begin and end"),
        (spec("structural_tag", TAG | {"triggers": ["<g"]}), "trigger"),
    ],
)  # fmt: skip
def test_wrong_grammar_is_refused_each_time_it_comes(
    compiler: GrammarCompiler, structured: StructuredSpec, word: str
) -> None:
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match=word) as error:
            compiler.state(structured)
        assert error.value.param == "structured_outputs"
    assert compiler.knows(structured)


def test_every_eos_ends_a_complete_text_and_none_an_unfinished_one(compiler: GrammarCompiler) -> None:
    for eos in (EOS, OTHER_EOS):
        state = compiler.state(spec("regex", "a*b?"))
        state.accept(ord("a"))
        assert {EOS, OTHER_EOS} <= allowed(state)
        state.accept(eos)
        assert state.complete
        assert state.error is None
    assert not {EOS, OTHER_EOS} & allowed(compiler.state(spec("regex", "a+")))


def test_requests_with_one_grammar_do_not_share_their_place(compiler: GrammarCompiler) -> None:
    first, second = (compiler.state(spec("regex", "ab")) for _ in range(2))
    first.accept(ord("a"))
    assert (allowed(first), allowed(second)) == ({ord("b")}, {ord("a")})


def test_token_the_grammar_does_not_allow_is_an_error_not_a_crash(compiler: GrammarCompiler) -> None:
    state = compiler.state(spec("regex", "ab"))
    state.accept(ord("z"))
    assert state.error


def test_reasoning_is_free_and_the_grammar_begins_after_it(compiler: GrammarCompiler) -> None:
    state = compiler.state(spec("regex", "[0-9]", reasoning=ReasoningSpan("<think>", "</think>", True)))
    for byte in b"hm </thin</think>":
        assert not state.applies
        state.accept(byte)
    assert state.applies
    assert allowed(state) == set(b"0123456789")


def test_opening_tag_is_allowed_beside_the_grammars_first_token(compiler: GrammarCompiler) -> None:
    span = ReasoningSpan("<think>", "</think>", False)
    vocabulary = Vocabulary(259, (EOS,), tokens=VOCABULARY.tokens, special=(EOS, OTHER_EOS, THINK))
    thinking = GrammarCompiler(vocabulary)
    state = thinking.state(spec("regex", "[0-9]", reasoning=span))
    assert allowed(state) == {*b"0123456789"} | ({THINK} if THINK in allowed(state) else set())
    state.accept(ord("5"))
    assert state.complete


def test_grammar_that_kills_the_trial_is_refused_and_the_next_one_works() -> None:
    trial = GrammarTrial(VOCABULARY)
    chain = "root ::= r0\n" + "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(20_000)) + 'r20000 ::= "b"\n'
    assert "nested too deep" in (trial(spec("grammar", chain)) or "")
    assert trial(spec("grammar", 'root ::= "a"')) is None
    assert "cannot be used" in (trial(spec("regex", "(")) or "")
    trial.close()


def test_trial_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = GrammarTrial(VOCABULARY)
    assert trial(spec("regex", "a")) is None
    monkeypatch.setattr(worker, "TRIAL_SECONDS", 0.0)
    assert "takes longer" in (trial(spec("regex", "|".join(f"word {i}" for i in range(5000)))) or "")
    monkeypatch.undo()
    assert trial(spec("regex", "a")) is None, "a new process takes its place"
    trial.close()


def test_grammar_that_needs_too_much_of_a_core_is_refused_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the trial is niced: where cores are busy the clock would come first
    monkeypatch.setattr(worker, "TRIAL_SECONDS", 60.0)
    trial = GrammarTrial(VOCABULARY)
    words = json.dumps([f"word {i * 7919}" for i in range(300_000)])
    reason = trial(spec("choice", words)) or ""
    assert "of a core to compile" in reason
    assert trial(spec("regex", "a")) is None
    trial.close()


def test_cache_holds_to_its_bound_and_drops_what_was_used_longest_ago() -> None:
    compiler = GrammarCompiler(VOCABULARY, cache_bytes=4 << 20)
    specs = [spec("regex", f"a{i}") for i in range(40)]
    for one in specs:
        compiler.state(one)
        compiler.state(specs[0])
    assert compiler.cached_bytes <= 4 << 20
    assert compiler.knows(specs[0])
    assert compiler.knows(specs[-1])
    assert not compiler.knows(specs[1])


@pytest.mark.parametrize("name", hostile())
def test_hostile_grammar_is_refused_or_works_in_bounded_time(compiler: GrammarCompiler, name: str) -> None:
    kind, value = hostile()[name]
    structured = spec(kind, value)
    started = time.thread_time()
    try:
        structured.validate()
        state = compiler.state(structured)
    except InvalidParameterError:
        state = None
    for _ in range(20):
        if state is None or state.error or state.complete:
            break
        token_id = min(allowed(state), default=None)
        if token_id is None or state.error:
            break
        state.accept(token_id)
    assert time.thread_time() - started < 10, "seconds of CPU for compiling and twenty masks"
