"""Chat messages to one string, by the checkpoint's Jinja template, under transformers' conventions and a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError
from nvfp4_runtime.text.template_limits import LimitedEnvironment, limited, measure
from nvfp4_runtime.text.tokenizer import Tokenizer, read_json

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 16 << 20

# Variables we set ourselves: a client's chat_template_kwargs may not replace them.
_SPECIAL_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"}
RESERVED = _SPECIAL_TOKENS | {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
}

# What a template's own code can raise, given messages it was not written for.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One or several named templates of a checkpoint; "tool_use" is taken when tools are given."""

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        named = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.sources = named
        self._special_tokens = dict(special_tokens or {})
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        variables: set[str] = set()
        for name, source in named.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise UnsupportedFormatError(
                    f"chat template {name!r} has {len(source)} characters; expected at most {MAX_TEMPLATE_CHARS}"
                )
            try:
                tree = environment.parse(source)
                variables |= jinja2.meta.find_undeclared_variables(tree)
                self._templates[name] = environment.compiled(tree)
            except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
                raise UnsupportedFormatError(f"chat template {name!r} does not compile: {error}") from error
        self.variables = frozenset(variables)
        self.source = "\n".join(named.values())

    @classmethod
    def load(cls, folder: str | Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate | None:
        """The template of a checkpoint: chat_template.jinja, else tokenizer_config.json's; None when it has none."""
        folder = Path(folder)
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special_tokens)
        declared = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(declared, list):
            named = {entry["name"]: entry["template"] for entry in declared}
            return cls(named, special_tokens) if named else None
        return cls(declared, special_tokens) if isinstance(declared, str) else None

    @property
    def extra_variables(self) -> frozenset[str]:
        """What `chat_template_kwargs` may set: names the template reads and we do not set ourselves."""
        return self.variables - RESERVED

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. InvalidParameterError (messages) when the template refuses them or they make it fail.

        continue_final_message: end right after the last message's text, so that the model goes on with it.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default") or next(iter(self._templates.values()))
        context = {**(variables or {}), **self._special_tokens}
        try:
            rendered = _generate(
                template,
                context
                | {"messages": messages, "tools": tools, "documents": documents}
                | {"add_generation_prompt": add_generation_prompt},
            )
        except _TEMPLATE_FAILURES as error:
            reason = f"the chat template cannot render these messages: {error}"
            raise InvalidParameterError(reason, "messages") from error
        return _cut_after_final(rendered, messages) if continue_final_message else rendered


def render_to_ids(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """Render a chat and encode it so that special tokens come from the template alone: (prompt text, ids)."""
    shielded = [{k: v if k == "role" else tokenizer.shield(v) for k, v in message.items()} for message in messages]
    rendered = template.render(
        shielded,
        tools=tokenizer.shield(tools),
        documents=tokenizer.shield(documents),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=tokenizer.shield(dict(variables or {})),
    )
    try:
        token_ids = tokenizer.encode_rendered(rendered, add_special_tokens=add_special_tokens)
    except InvalidParameterError as error:
        raise InvalidParameterError(str(error), "messages") from error
    return tokenizer.unshield(rendered), token_ids


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _generate(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    """Render piece by piece: a template that writes without end is stopped at MAX_RENDERED_CHARS."""
    pieces: list[str] = []
    size = 0
    with limited():
        for piece in template.generate(context):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_RENDERED_CHARS} characters")
    return "".join(pieces)


def _cut_after_final(rendered: str, messages: Sequence[Mapping[str, Any]]) -> str:
    final = str(messages[-1].get("content") or "").strip()
    position = rendered.rfind(final) if final else -1
    if position < 0:
        raise InvalidParameterError(
            "continue_final_message needs a last message whose text the chat template writes unchanged; "
            "it is empty or the template changed it",
            "continue_final_message",
        )
    end = position + len(final)
    # Trailing blanks the client wrote stay if the template kept them.
    content = str(messages[-1]["content"])
    tail = content[len(content.rstrip()) :]
    return rendered[: end + len(tail)] if tail and rendered.startswith(tail, end) else rendered[:end]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes HTML characters, which is not what models were trained on."""
    measure(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
