"""Reasoning parsers by name (`--reasoning-parser`), and which one a chat template calls for."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.structured.spec import ReasoningSpan
from server.reasoning.think import THINK, THINK_END, ThinkTags
from server.tools.events import TextParser
from server.tools.harmony import FINAL, Harmony


@dataclass(frozen=True)
class ReasoningStyle:
    """How a model family writes its reasoning.

    always_thinks  without a word in the prompt, its answers begin inside the reasoning
    is_harmony     channels instead of tags; the parser then finds tool calls as well
    """

    name: str
    always_thinks: bool = False
    is_harmony: bool = False

    def begins_open(self, prompt: str) -> bool:
        """Whether the answer to this prompt begins inside the reasoning: the template's last word decides."""
        end = prompt[-64:].rstrip()
        return end.endswith(THINK) or (self.always_thinks and not end.endswith(THINK_END))

    def parser(self, prompt: str) -> TextParser:
        return Harmony() if self.is_harmony else ThinkTags(self.begins_open(prompt))

    @property
    def tags(self) -> tuple[str, str]:
        """Around the reasoning, where it is not a channel."""
        return THINK, THINK_END

    @property
    def markers(self) -> tuple[str, ...]:
        return Harmony.markers if self.is_harmony else ThinkTags.markers

    def span(self, prompt: str) -> ReasoningSpan | None:
        """What a grammar has to leave alone before it begins; None when the prompt has closed the reasoning."""
        if self.is_harmony:
            return ReasoningSpan("", FINAL, True)
        if prompt[-64:].rstrip().endswith(THINK_END):
            return None
        return ReasoningSpan(THINK, THINK_END, self.begins_open(prompt))


_STYLES = {
    "deepseek_r1": ReasoningStyle("deepseek_r1", always_thinks=True),
    "qwen3": ReasoningStyle("qwen3"),
    "nemotron": ReasoningStyle("nemotron"),
    "gpt_oss": ReasoningStyle("gpt_oss", is_harmony=True),
}
_ALIASES = {
    "openai_gptoss": "gpt_oss",
    "nano_v3": "nemotron",
    "nemotron_v3": "nemotron",
    "deepseek_v3": "qwen3",  # thinks where the prompt opens the tag
}
REASONING_PARSERS = (*_STYLES, *_ALIASES)


def reasoning_style(name: str, template: str | None) -> ReasoningStyle | None:
    """The style called `name`; "auto" looks into the chat template, "none" is none. ConfigError for another name."""
    if name == "none":
        return None
    if name != "auto":
        style = _STYLES.get(_ALIASES.get(name, name))
        if style is None:
            known = ", ".join(("auto", "none", *REASONING_PARSERS))
            raise ConfigError(f"there is no reasoning parser {name!r}; expected one of {known}", "--reasoning-parser")
        return style
    if template is None:
        return None
    if "<|channel|>" in template and "<|message|>" in template:
        return _STYLES["gpt_oss"]
    return _STYLES["qwen3"] if THINK_END in template else None
