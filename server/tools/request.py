"""The tools of a chat request: their fields, what is refused, and what the chosen tool_choice means."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.spec import MAX_DEPTH, MAX_SPEC_BYTES, StructuredSpec, nesting
from server.protocol.fields import ShortStr as FunctionName
from server.protocol.fields import Text
from server.structured import json_text

MAX_TOOLS = 1024
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionDefinition(BaseModel):
    """A function the model may call. `parameters` is a JSON schema of an object; none: it takes nothing."""

    model_config = ConfigDict(extra="allow")
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: FunctionName


class NamedToolChoice(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"] = "function"
    function: NamedFunction


class ToolFields(BaseModel):
    """What a chat request says of tools."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True

    def check_tools(self) -> None:
        """Refuse what can be refused without the model. Raises InvalidParameterError naming the field."""
        if self.tools is not None and not self.tools:
            raise InvalidParameterError("tools must hold at least one tool; leave it out for none", "tools")
        if self.tools is None:
            if self.tool_choice not in (None, "none"):
                raise InvalidParameterError("tool_choice needs tools", "tool_choice")
            return
        names: set[str] = set()
        for i, tool in enumerate(self.tools):
            _check_function(tool.function, i)
            if tool.function.name in names:
                raise InvalidParameterError(f"tools.{i}: the name {tool.function.name!r} is taken already", "tools")
            names.add(tool.function.name)
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise InvalidParameterError(
                f"tool_choice names {self.tool_choice.function.name!r:.140}, which is not among tools", "tool_choice"
            )

    @property
    def choice(self) -> Literal["none", "auto", "required"] | NamedToolChoice:
        """What tool_choice comes to: auto where tools are given and nothing is said."""
        if self.tools is None or self.tool_choice == "none":
            return "none"
        return self.tool_choice or "auto"

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Each tool's parameters, by name."""
        return {tool.function.name: tool.function.parameters or NO_PARAMETERS for tool in self.tools or ()}

    def forced_spec(self) -> StructuredSpec | None:
        """The grammar of a forced call: an array of calls (required), or one tool's arguments (named)."""
        match self.choice:
            case NamedToolChoice(function=function):
                return _compact(self.schemas[function.name])
            case "required":
                return _compact(calls_schema(self.schemas, self.parallel_tool_calls))
            case _:
                return None


def _compact(schema: dict[str, Any]) -> StructuredSpec:
    """JSON without blanks between its tokens: nobody reads it but a program."""
    return StructuredSpec(kind="json", value=json.dumps(schema), param="tools", any_whitespace=False)


def calls_schema(schemas: dict[str, dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """The schema of an array of {"name", "parameters"} with at least one call, exactly one unless `parallel`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/tool_{i}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, name in enumerate(schemas)
    ]
    definitions = {f"tool_{i}": _moved(schema, f"#/$defs/tool_{i}") for i, schema in enumerate(schemas.values())}
    found: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return found if parallel else {**found, "maxItems": 1}


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its references to "#" pointing to where it is now."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, root) for key, value in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        found["$ref"] = root + reference[1:]
    return found


def _check_function(function: FunctionDefinition, position: int) -> None:
    if not _NAME.fullmatch(function.name):
        raise InvalidParameterError(
            f"tools.{position}: a name has 1 to 128 letters, digits and _ . : / -, found {function.name!r:.140}",
            "tools",
        )
    schema = function.parameters
    if schema is None:
        return
    text = json_text(schema, f"tools.{position}.parameters")
    if len(text) > MAX_SPEC_BYTES or nesting(text) > MAX_DEPTH - 8:  # the array of calls adds some
        raise InvalidParameterError(
            f"tools.{position}: parameters may have {MAX_SPEC_BYTES} bytes and {MAX_DEPTH - 8} nested brackets at most",
            "tools",
        )
    if schema.get("type", "object") != "object":
        raise InvalidParameterError(
            f"tools.{position}: parameters must be the JSON schema of an object, found type {schema['type']!r:.64}",
            "tools",
        )
    if not isinstance(schema.get("properties", {}), dict):
        raise InvalidParameterError(f"tools.{position}: parameters.properties must be an object", "tools")
