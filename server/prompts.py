"""From a request's prompt or messages to token ids that fit, and the number of tokens it may generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nvfp4_runtime.errors import InvalidParameterError, PromptTooLongError, UnsupportedFormatError
from nvfp4_runtime.text.chat_template import ChatTemplate, render_to_ids
from nvfp4_runtime.text.confined import ConfinedTemplate
from nvfp4_runtime.text.processor import TextProcessor
from nvfp4_runtime.text.tokenizer import Tokenizer
from server.protocol.chat import ChatCompletionRequest, ChatMessage
from server.protocol.embeddings import EmbeddingRequest
from server.protocol.fields import TEXT_ALONE
from server.protocol.generation import GenerationRequest
from server.tools.describe import calls_as_text, described

MAX_TEMPLATE_STRING_CHARS = 1024
# Switches that many clients send to any model. Turning off what a template does not have is no request.
_HARMLESS_OFF = frozenset({"enable_thinking", "thinking"})


@dataclass(frozen=True)
class EncodedPrompt:
    """`text` is what echo repeats."""

    text: str
    token_ids: list[int]


def encode_prompts(
    prompt: Any, tokenizer: Tokenizer, *, add_special_tokens: bool, param: str = "prompt"
) -> list[EncodedPrompt]:
    """Every prompt of a `fields.Prompt`, in order. Special tokens written in text are read as such, as in vLLM."""
    items: list[str | list[int]] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    encoded = []
    for item in items:
        if isinstance(item, str):
            token_ids = _encode(item, tokenizer, param, add_special_tokens=add_special_tokens)
            encoded.append(EncodedPrompt(item, token_ids))
        else:
            # Decoding waits until echo needs it: ids may be out of range here.
            encoded.append(EncodedPrompt("", item))
    return encoded


def num_chars(prompt: Any) -> int:
    """Characters of text in a `fields.Prompt`: what it costs to encode."""
    return len(prompt) if isinstance(prompt, str) else sum(len(item) for item in prompt if isinstance(item, str))


def _encode(text: str, tokenizer: Tokenizer, param: str, *, add_special_tokens: bool) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except InvalidParameterError as error:
        raise InvalidParameterError(str(error), param) from error


def encode_chat(request: ChatCompletionRequest, text: TextProcessor) -> EncodedPrompt:
    """Render and encode a chat. Raises InvalidParameterError for what the template or this server cannot take."""
    template = text.chat_template if request.chat_template is None else _own_template(request.chat_template, text)
    if template is None:
        raise InvalidParameterError(
            "this model has no chat template; use /v1/completions, or add a chat_template.jinja to the checkpoint",
            "messages",
        )
    if request.documents is not None and "documents" not in template.variables:
        raise InvalidParameterError("this model's chat template does not use documents; leave them out", "documents")
    messages = [_message(message, i) for i, message in enumerate(request.messages)]
    tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
    if "tool_calls" not in template.source:
        messages = calls_as_text(messages)
    if tools and "tools" not in template.variables:
        messages = described(messages, tools) if request.choice != "none" else messages
        tools = []
    rendered, token_ids = render_to_ids(
        template,
        text.tokenizer,
        messages,
        tools=tools or None,
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=request.add_special_tokens,
        variables=request.effort_variables(template.extra_variables)
        | _template_variables(request.chat_template_kwargs or {}, template.extra_variables),
    )
    return EncodedPrompt(rendered, token_ids)


def bad_words_token_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The token sequences of each word, at the start of a text and after a blank, as vLLM has them.

    The one after a blank counts only where it is another token of the same number: " word" beside "word".
    """
    found = []
    for word in words:
        bare = word.lstrip()
        plain = _encode(bare, tokenizer, "bad_words", add_special_tokens=False)
        if not plain:
            raise InvalidParameterError(f"bad_words: {word!r:.64} has no tokens", "bad_words")
        found.append(tuple(plain))
        spaced = _encode(" " + bare, tokenizer, "bad_words", add_special_tokens=False)
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(tuple(spaced))
    return found


def fit(
    request: GenerationRequest | EmbeddingRequest, token_ids: list[int], max_tokens: int | None, max_model_len: int
) -> list[int]:
    """`token_ids`, cut as truncate_prompt_tokens asks; refused when empty or longer than the context."""
    keep = request.truncate_prompt_tokens
    if keep is not None:
        if keep == 0 or keep < -1 or keep > max_model_len:
            raise InvalidParameterError(
                f"truncate_prompt_tokens must be -1 or between 1 and {max_model_len}, got {keep}",
                "truncate_prompt_tokens",
            )
        keep = max(1, max_model_len - (max_tokens or 1)) if keep == -1 else keep
        token_ids = token_ids[-keep:] if request.truncation_side == "left" else token_ids[:keep]
    param = request.prompt_field
    if not token_ids:
        raise InvalidParameterError("the prompt is empty; expected at least one token", param)
    if len(token_ids) >= max_model_len:
        raise PromptTooLongError(
            f"This model's maximum context length is {max_model_len} tokens. However, your request has "
            f"{len(token_ids)} input tokens. Please reduce the length of the {param}.",
            len(token_ids),
            max_model_len,
            param,
        )
    return token_ids


def output_budget(asked: int | None, default: int | None, num_prompt: int, max_model_len: int, param: str) -> int:
    """Tokens a request may generate: what it asks for, which must fit, or else `default` as far as it fits."""
    room = max_model_len - num_prompt
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise PromptTooLongError(
            f"'{param}' is too large: {asked}. This model's maximum context length is {max_model_len} tokens and your "
            f"request has {num_prompt} input tokens ({asked} > {max_model_len} - {num_prompt}).",
            num_prompt + asked,
            max_model_len,
            param,
        )
    return asked


@lru_cache(maxsize=8)
def _compile_template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ConfinedTemplate(source, dict(special_tokens))


def _own_template(source: str, text: TextProcessor) -> ChatTemplate:
    """The template a request brings along (the server has said that it may)."""
    try:
        return _compile_template(source, tuple(text.tokenizer.special_tokens.items()))
    except UnsupportedFormatError as error:
        raise InvalidParameterError(str(error), "chat_template") from error


def _message(message: ChatMessage, position: int) -> dict[str, Any]:
    """What the template sees of a message: text content, and the fields that templates know."""
    found: dict[str, Any] = {"role": message.role, "content": _text_of(message.content, position)}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = reasoning
    if message.tool_calls:
        found["tool_calls"] = [_tool_call(call, position) for call in message.tool_calls]
    return found


def _text_of(content: str | Sequence[dict[str, Any]] | None, position: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        kind = part.get("type")
        value = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "refusal", "input_text", "output_text"):
            raise InvalidParameterError(
                f"messages.{position}.content: this server takes text parts only ({TEXT_ALONE}), found a part of type "
                f"{kind!r:.64}",
                "messages",
            )
        if not isinstance(value, str):
            raise InvalidParameterError(f"messages.{position}.content: a text part needs a string", "messages")
        parts.append(value)
    return "\n".join(parts)


def _tool_call(call: dict[str, Any], position: int) -> dict[str, Any]:
    """A past tool call, its arguments as an object: that is what templates iterate over."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidParameterError(f"messages.{position}.tool_calls: each needs a function with a name", "messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidParameterError(
                f"messages.{position}.tool_calls: the arguments of {function['name']!r:.64} are not JSON", "messages"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _template_variables(asked: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The allow-list: names the template reads, with plain values."""
    for name, value in asked.items():
        if name not in known and not (name in _HARMLESS_OFF and value is False):
            listed = ", ".join(sorted(known)) or "none"
            raise InvalidParameterError(
                f"the chat template has no variable {name!r:.64}; it knows: {listed}", "chat_template_kwargs"
            )
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_STRING_CHARS:
            raise InvalidParameterError(
                f"chat_template_kwargs.{name} has {len(value)} characters; at most {MAX_TEMPLATE_STRING_CHARS} fit",
                "chat_template_kwargs",
            )
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise InvalidParameterError(
                f"chat_template_kwargs.{name} must be a string, number or boolean", "chat_template_kwargs"
            )
    return asked
