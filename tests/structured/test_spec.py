"""What is refused before any compiler sees it, and EBNF rewritten as Lark."""

from __future__ import annotations

import json

import pytest

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.ebnf import ebnf_to_lark, looks_like_ebnf
from nvfp4_runtime.structured.grammars import closed
from nvfp4_runtime.structured.literals import regex_literal
from nvfp4_runtime.structured.spec import MAX_SPEC_BYTES, ReasoningSpan, StructuredSpec, nesting


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (StructuredSpec(kind="regex", value="a" * (MAX_SPEC_BYTES + 1)), "bytes"),
        (StructuredSpec(kind="regex", value="(" * 65 + ")" * 65), "nested 65"),
        (StructuredSpec(kind="json", value="[" * 100_000), "nested"),
        (StructuredSpec(kind="regex", value="()" * 70_000), "140000 brackets"),
        (StructuredSpec(kind="choice", value="[]"), "list of 1"),
        (StructuredSpec(kind="choice", value='["a", ""]'), "none of them empty"),
        (StructuredSpec(kind="choice", value='{"a": 1}'), "list of 1"),
        (StructuredSpec(kind="choice", value="nonsense"), "not valid JSON"),
        (StructuredSpec(kind="choice", value=json.dumps(["a"] * 10_001)), "10000"),
    ],
)
def test_spec_no_compiler_should_see_is_refused(spec: StructuredSpec, word: str) -> None:
    with pytest.raises(InvalidParameterError, match=word) as error:
        spec.validate()
    assert error.value.param == "structured_outputs"


def test_nesting_counts_the_most_brackets_open_at_once() -> None:
    assert [nesting(text) for text in ("", "a", "()[]{}", "({[", "(()(()))", ")))(")] == [0, 0, 1, 3, 3, 1]


def test_grammar_key_is_of_the_grammar_alone() -> None:
    spec = StructuredSpec(kind="regex", value="a")
    assert (
        spec.grammar_key
        == StructuredSpec(
            kind="regex", value="a", param="other", reasoning=ReasoningSpan("<t>", "</t>", True)
        ).grammar_key
    )
    assert spec.grammar_key != StructuredSpec(kind="regex", value="b").grammar_key
    assert spec.grammar_key != StructuredSpec(kind="regex", value="a", any_whitespace=False).grammar_key


def test_closed_objects_take_no_other_properties() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}, "b": {"type": "string"}}}
    assert closed(schema) == {
        "type": "object", "additionalProperties": False,
        "properties": {
            "a": {"type": "object", "properties": {}, "additionalProperties": False}, "b": {"type": "string"},
        },
    }  # fmt: skip
    assert closed({"properties": {}, "additionalProperties": True})["additionalProperties"] is True


def test_regex_literal_keeps_what_is_escaped() -> None:
    assert regex_literal("a/b\\/c\\\\/\n") == r"/a\/b\/c\\\/\n/"


@pytest.mark.parametrize(
    ("ebnf", "lark"),
    [
        ('root ::= "a" b*\nb ::= [x-z]\n', 'start: "a" r_b *\nr_b: /[x-z]/\n'),
        ('root ::= ("a" | "b"){2}  # both\n  "c"', 'start: ( "a" | "b" ) {2,2} "c"\n'),
        ('root ::= a-b a_b aB\na-b ::= "1"\na_b ::= "2"\naB ::= "3"',
         'start: r_a_db r_a_ub r_a_cb\nr_a_db: "1"\nr_a_ub: "2"\nr_a_cb: "3"\n'),
        ('root ::= [^"\\\\\\n] . "\\"\\x41\\u00e9"', 'start: /[^"\\x5c\\x0a]/ /(?s:.)/ "\\"Aé"\n'),
        ("root ::= [a-z]{2,} [0-9]{1,3}?", "start: /[a-z]/ {2,} /[0-9]/ {1,3} ?\n"),
        ("root ::= [\\]\\-/]", "start: /[\\x5d\\x2d\\x2f]/\n"),
        ('root ::=\n | "x"', 'start: | "x"\n'),
    ],
)  # fmt: skip
def test_ebnf_as_lark(ebnf: str, lark: str) -> None:
    assert looks_like_ebnf(ebnf)
    assert ebnf_to_lark(ebnf) == lark


@pytest.mark.parametrize(
    ("ebnf", "word"),
    [
        ("a ::= b", "root"), ('root ::= "a"\nroot ::= "b"', "twice"), ('root ::= "a\nb ::= "c"', "line 1"),
        ("root ::= %", "line 1"), ('"x" root ::= "a"', "before any rule"), ("::= a", "name of a rule"),
        ('root ::= "\\ud800"', "U\\+D800"), ("root ::= [a", "line 1"),
    ],
)  # fmt: skip
def test_ebnf_that_cannot_be_read_says_where(ebnf: str, word: str) -> None:
    with pytest.raises(InvalidParameterError, match=word):
        ebnf_to_lark(ebnf)


def test_lark_is_not_taken_for_ebnf() -> None:
    assert not looks_like_ebnf('start: "a" b\nb: /[::=]/')
