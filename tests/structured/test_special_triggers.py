"""Structural tags whose marks are special tokens: the token fires, its spelling in characters does not."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.spec import StructuredSpec
from tests.structured.test_compiler import BYTES, allowed, spec

EOS, CALL, TOOL, DONE = 256, 257, 258, 259
VOCABULARY = Vocabulary(
    260, (EOS,), tokens=(*BYTES, b"<eos>", b"<|call|>", b"[TOOL]", b"<|done|>"), special=(EOS, CALL, TOOL, DONE)
)
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY)


def tag(begin: str, end: str, content: Any = NUMBER) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(*tags: dict[str, Any], triggers: list[str]) -> StructuredSpec:
    return spec("structural_tag", {"format": {"type": "triggered_tags", "triggers": triggers, "tags": list(tags)}})


def says(state: GrammarState, *parts: str | int) -> str:
    """How far the grammar follows text and special tokens: "may end", "open", or the number of tokens it took."""
    tokens = [token for part in parts for token in ([part] if isinstance(part, int) else part.encode())]
    for i, token in enumerate(tokens):
        if token not in allowed(state):
            return f"took {i}"
        state.accept(token)
        assert state.error is None
    return "may end" if EOS in allowed(state) else "open"


CALLS = triggered(tag("<|call|>f=", "<|done|>"), tag("<|call|>g=", "[TOOL]"), triggers=["<|call|>"])


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        (("free", CALL, "f=12", DONE, " and free", CALL, "g=3", TOOL), "may end"),
        ((CALL, "f=12"), "open"),
        ((CALL, "h"), "took 1"),
        ((CALL, "f=x"), "took 3"),
        ((CALL, "f=1", TOOL), "took 4"),
        (("<|call|>h", "and so on"), "may end"),  # characters, not the token
        (("free", DONE), "took 4"),
    ],
)
def test_the_token_fires_and_its_spelling_does_not(
    compiler: GrammarCompiler, parts: tuple[str | int, ...], outcome: str
) -> None:
    assert says(compiler.state(CALLS), *parts) == outcome


@pytest.mark.parametrize(
    ("structured", "parts", "outcome"),
    [
        (triggered(tag("to <|call|>", "."), triggers=["to <|call|>"]), ("go to ", CALL, "5."), "may end"),
        (triggered(tag("to <|call|>", "."), triggers=["to <|call|>"]), ("go ", CALL), "took 3"),
        (triggered(tag("<n>", "</n>"), tag("[TOOL]", "!"), triggers=["<n>", "[TOOL]"]),
         ("a<n>1</n>b", TOOL, "2!c"), "may end"),
        (triggered(tag("<n>", "</n>"), tag("[TOOL]", "!"), triggers=["<n>", "[TOOL]"]), ("a<n>x",), "took 4"),
        (triggered(tag("<|call|>", "<|done|>", {"type": "any_text"}), triggers=["<|call|>"]),
         (CALL, "whatever", DONE, "free"), "may end"),
        (spec("structural_tag", {"structures": [{"begin": "<|call|>", "schema": {"type": "integer"},
                                                 "end": "<|done|>"}],
                                 "triggers": ["<|call|>"]}), ("x", CALL, "7", DONE), "may end"),
        (spec("structural_tag", {"format": {"type": "const_string", "value": "a<|call|>b[TOOL]"}}),
         ("a", CALL, "b", TOOL), "may end"),
        (spec("structural_tag", {"format": {"type": "tags_with_separator", "separator": "[TOOL]",
                                            "tags": [tag("<", ">")], "at_least_one": True}}),
         ("<1>", TOOL, "<2>"), "may end"),
    ],
)  # fmt: skip
def test_special_tokens_stand_anywhere_in_a_tag(
    compiler: GrammarCompiler, structured: StructuredSpec, parts: tuple[str | int, ...], outcome: str
) -> None:
    assert says(compiler.state(structured), *parts) == outcome


def test_a_trigger_that_ends_inside_a_token_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidParameterError, match="ends inside"):
        compiler.state(triggered(tag("<|call|>", ""), triggers=["<|ca"]))
