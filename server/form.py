"""What form an answer takes: which parsers read it, which grammar it must follow, which special tokens matter."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.spec import StructuredSpec
from nvfp4_runtime.text.processor import TextProcessor
from nvfp4_runtime.text.tokenizer import Tokenizer
from server.message import MessageWriter, Pipeline
from server.protocol.chat import ChatCompletionRequest
from server.reasoning.parsers import ReasoningStyle, reasoning_style
from server.reasoning.tokens import ReasoningTokens, thinking_of
from server.tools.bare_json import ForcedCall, ForcedCalls
from server.tools.events import TextParser
from server.tools.parsers import HERMES, ToolStyle, tool_style
from server.tools.request import NamedToolChoice


@dataclass(frozen=True)
class Styles:
    """How the served model writes tool calls and reasoning; None where it does not, or nobody knows."""

    tools: ToolStyle | None
    reasoning: ReasoningStyle | None
    reasoning_tokens: ReasoningTokens | None = None

    @classmethod
    def of(cls, text: TextProcessor, tool_call_parser: str, reasoning_parser: str) -> Styles:
        """By name, or by what the chat template teaches. Raises ConfigError for a name that is not known."""
        template = text.chat_template
        source = None if template is None else template.source
        has_tools = template is not None and "tools" in template.variables
        tools = tool_style(tool_call_parser, source, has_tools)
        channels = tools is not None and tools.name == "gpt_oss"  # one syntax for both: neither goes without the other
        reasoning = reasoning_style("gpt_oss" if channels else reasoning_parser, source)
        return cls(tools, reasoning, None if reasoning is None else ReasoningTokens.of(reasoning, text.tokenizer))


class AnswerForm:
    """One chat request's answer. Raises InvalidParameterError for what this server or model cannot give."""

    def __init__(self, request: ChatCompletionRequest, styles: Styles, prompt: str) -> None:
        self._request = request
        self._styles = styles
        self._prompt = prompt
        self.named = isinstance(request.choice, NamedToolChoice)
        if request.choice == "auto" and styles.tools is None:
            raise InvalidParameterError(
                "tool_choice auto needs a tool-call parser, and this model's chat template does not tell which: start "
                "the server with --tool-call-parser, or use tool_choice required or a named tool",
                "tool_choice",
            )
        self.structured = self._structured()
        self.span, self.thinking = thinking_of(styles.reasoning_tokens, prompt, self._budget())

    def _budget(self) -> int | None:
        """Tokens of reasoning: none at all where no effort is asked for, whatever the template does about it."""
        unwanted = self._request.reasoning_effort == "none" and self._styles.reasoning is not None
        return 0 if unwanted else self._request.thinking_token_budget

    def _structured(self) -> StructuredSpec | None:
        """The grammar: a forced call's, else the one the request gives. It begins where the reasoning ends."""
        spec = self._request.forced_spec() or self._request.structured_spec()
        if spec is None or self._styles.reasoning is None:
            return spec
        return msgspec.structs.replace(spec, reasoning=self._styles.reasoning.span(self._prompt))

    def kept_special_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that the parsers have to see."""
        markers: tuple[str, ...] = () if self._styles.reasoning is None else self._styles.reasoning.markers
        if self._request.choice == "auto" and self._styles.tools is not None:
            markers += self._styles.tools.markers
        return tokenizer.special_ids_of(markers)

    def writer(self) -> MessageWriter:
        """For one choice."""
        tools, reasoning = self._tool_parser(), self._styles.reasoning
        pipeline = None
        if tools is not None or reasoning is not None:
            pipeline = Pipeline(None if reasoning is None else reasoning.parser(self._prompt), tools)
        return MessageWriter(
            pipeline,
            (self._styles.tools or HERMES).call_id,
            include_reasoning=self._request.include_reasoning,
            max_calls=None if self._request.parallel_tool_calls else 1,
        )

    def _tool_parser(self) -> TextParser | None:
        match self._request.choice:
            case NamedToolChoice(function=function):
                return ForcedCall(function.name)
            case "required":
                return ForcedCalls()
            case "auto" if self._styles.tools is not None:
                return self._styles.tools.make(self._request.schemas)
        return None
