"""response_format and structured_outputs over HTTP: what reaches the engine, and every 400."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvfp4_runtime.structured.spec import StructuredSpec
from tests.server.conftest import Serve, assert_error

BOTH = ("/v1/completions", "/v1/chat/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"name": "thing", "schema": SCHEMA, "strict": True}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    return {"max_tokens": 2} | base | fields


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("fields", "kind", "value", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", "", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, "json", json.dumps(SCHEMA),
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, "json_object", "",
         "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, "json", json.dumps(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", json.dumps(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True, "json": None}}, "json_object", "",
         "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"', "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": '{"format": {}}'}}, "structural_tag", '{"format": {}}',
         "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "regex", "a",
         "structured_outputs.regex"),
    ],
)  # fmt: skip
async def test_constraint_reaches_the_engine(
    serve: Serve, path: str, fields: dict[str, Any], kind: str, value: str, param: str
) -> None:
    server = await serve()
    response = await server.post(path, body_for(path, **fields))
    assert response.status_code == 200, response.text
    spec = server.engine.submitted[0].params.structured
    assert spec is not None
    assert (spec.kind, spec.value, spec.param) == (kind, value, param)


async def test_options_reach_the_engine(serve: Serve) -> None:
    server = await serve()
    options = {"json": SCHEMA, "disable_any_whitespace": True, "disable_additional_properties": True}
    await server.chat(structured_outputs=options | {"whitespace_pattern": " ?"}, max_tokens=1)
    spec = server.engine.submitted[0].params.structured
    assert isinstance(spec, StructuredSpec)
    assert (spec.any_whitespace, spec.closed_objects, spec.whitespace_pattern) == (False, True, " ?")


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("response_format", {"type": "xml"}, "type"),
        ("response_format", {}, "type"),
        ("response_format", "json", ""),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "name"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}, "schema"),
        ("structured_outputs", {}, "exactly one"),
        ("structured_outputs", {"json": SCHEMA, "regex": "a"}, "json, regex"),
        ("structured_outputs", {"choice": ["a"], "grammar": "x"}, "choice, grammar"),
        ("structured_outputs", {"json": 5}, "schema"),
        ("structured_outputs", {"regex": ""}, "empty"),
        ("structured_outputs", {"regex": ["a"]}, "string"),
        ("structured_outputs", {"choice": []}, "list of 1"),
        ("structured_outputs", {"choice": ["a", 5]}, "strings"),
        ("structured_outputs", {"choice": "a"}, "list"),
        ("structured_outputs", {"json_object": "yes"}, "true"),
        ("structured_outputs", {"regexp": "a"}, "regexp"),
        ("structured_outputs", {"json": SCHEMA, "disable_any_whitespace": "yes"}, "true or false"),
        ("structured_outputs", {"json": SCHEMA, "whitespace_pattern": "x" * 257}, "256"),
        ("structured_outputs", {"regex": "(" * 100 + ")" * 100}, "nested"),
        ("structured_outputs", {"grammar": "#" * (1 << 20) + "é"}, "bytes"),
        ("structured_outputs", {"regex": "\ud800"}, "surrogate"),
        ("structured_outputs", "a", ""),
    ],
)  # fmt: skip
async def test_constraint_that_cannot_be_is_a_400_naming_the_field(
    serve: Serve, path: str, field: str, value: Any, word: str
) -> None:
    server = await serve()
    content = json.dumps(body_for(path, **{field: value}))
    headers = {"content-type": "application/json"}
    assert_error(await server.http.post(path, content=content, headers=headers), 400, field, word)
    assert server.engine.running == 0


async def test_two_constraints_are_refused(serve: Serve) -> None:
    server = await serve()
    fields = {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}
    assert_error(await server.chat(**fields), 400, "structured_outputs", "response_format")


async def test_very_deep_schema_is_a_400(serve: Serve) -> None:
    server = await serve()
    deep = '{"a":' * 900 + "1" + "}" * 900
    content = f'{{"prompt": "Hi", "structured_outputs": {{"json": {deep}}}}}'
    headers = {"content-type": "application/json"}
    assert_error(await server.http.post("/v1/completions", content=content, headers=headers), 400, "structured_outputs")
