"""Tool-call parsers by name (`--tool-call-parser`), and which one a chat template calls for."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_runtime.errors import ConfigError
from server.tools.bare_json import Llama3Json
from server.tools.deepseek import DeepSeekTools
from server.tools.events import PlainText, TextParser
from server.tools.mistral import MistralTools
from server.tools.qwen3_coder import Qwen3Coder
from server.tools.tagged_json import TaggedJson

Schemas = Mapping[str, Any]
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolStyle:
    """How a model family writes calls. `make` builds a parser, given each tool's schema.

    markers   what the syntax is made of: special tokens among them must reach the parser
    short_id  ids of nine letters and digits, which Mistral's templates insist on
    """

    name: str
    make: Callable[[Schemas], TextParser]
    markers: tuple[str, ...]
    short_id: bool = False

    def call_id(self) -> str:
        if self.short_id:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _hermes(schemas: Schemas) -> TextParser:
    return TaggedJson("<tool_call>", "</tool_call>")


def _nemotron(schemas: Schemas) -> TextParser:
    return TaggedJson("<TOOLCALL>", "</TOOLCALL>")


_STYLES = {
    style.name: style
    for style in (
        ToolStyle("hermes", _hermes, ("<tool_call>", "</tool_call>")),
        ToolStyle("llama3_json", lambda schemas: Llama3Json(), ("<|python_tag|>",)),
        ToolStyle("mistral", lambda schemas: MistralTools(), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), short_id=True),
        ToolStyle("qwen3_coder", Qwen3Coder, ("<tool_call>", "</tool_call>")),
        ToolStyle("deepseek_v3", lambda schemas: DeepSeekTools(), DeepSeekTools.markers),
        ToolStyle("nemotron", _nemotron, ("<TOOLCALL>", "</TOOLCALL>")),
        # the reasoning parser of the same name finds the calls: channels cannot be taken apart twice
        ToolStyle("gpt_oss", lambda schemas: PlainText(), ()),
    )
}
_ALIASES = {
    "qwen3_xml": "qwen3_coder",
    "deepseek_v31": "deepseek_v3",
    "nemotron_json": "nemotron",
    "openai": "gpt_oss",
    "llama4_json": "llama3_json",
}
TOOL_PARSERS = (*_STYLES, *_ALIASES)
HERMES = _STYLES["hermes"]

# In a chat template -> the style it teaches; the first that is found. Qwen3-Coder's templates hold Hermes's tag too.
_SIGNS = (
    ("<|channel|>", "gpt_oss"),
    ("<function=", "qwen3_coder"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<TOOLCALL>", "nemotron"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ('{"name": function name, "parameters":', "llama3_json"),
)


def tool_style(name: str, template: str | None, template_has_tools: bool) -> ToolStyle | None:
    """The style called `name`; "auto" looks into the chat template, "none" is none. ConfigError for another name.

    A template that knows no tools gets Hermes's style: `server.tools.describe` then tells the model of it.
    """
    if name == "none":
        return None
    if name != "auto":
        style = _STYLES.get(_ALIASES.get(name, name))
        if style is None:
            known = ", ".join(("auto", "none", *TOOL_PARSERS))
            raise ConfigError(f"there is no tool-call parser {name!r}; expected one of {known}", "--tool-call-parser")
        return style
    if template is not None and template_has_tools:
        return next((_STYLES[style] for sign, style in _SIGNS if sign in template), None)
    return HERMES
