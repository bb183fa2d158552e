"""The markers of reasoning as token ids: for counting its tokens and for bounding them."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.thinking import Ids, ThinkingBudget, ThinkingSpan
from nvfp4_runtime.text.tokenizer import Tokenizer
from server.reasoning.parsers import ReasoningStyle
from server.tools.harmony import ANALYSIS, END, FINAL, REPLY

_BLANKS = (" ", "  ", "\n", "\n\n", "\t", " \n")


@dataclass(frozen=True)
class ReasoningTokens:
    """How one model's reasoning is marked. `ending` is what ends it and leads over to the answer."""

    style: ReasoningStyle
    opens: Ids
    closes: Ids
    ending: Ids
    blanks: Ids | None

    @classmethod
    def of(cls, style: ReasoningStyle, tokenizer: Tokenizer) -> ReasoningTokens:
        if style.is_harmony:
            opens, closes, ending = (_ids(text, tokenizer) for text in (ANALYSIS, END, END + REPLY + FINAL))
            return cls(style, opens, closes, ending, None)
        opens, closes = (_ids(text, tokenizer) for text in style.tags)
        blanks = [ids[0] for text in _BLANKS if len(ids := _ids(text, tokenizer)) == 1]
        return cls(style, opens, closes, closes, tuple(dict.fromkeys(blanks)))

    def span(self, prompt: str) -> ThinkingSpan | None:
        """Of an answer to this prompt; None when the prompt has closed the reasoning."""
        found = self.style.span(prompt)
        if found is None:
            return None
        return ThinkingSpan(self.opens, self.closes, found.is_open and not self.style.is_harmony, self.blanks)

    def budget(self, prompt: str, num_tokens: int) -> ThinkingBudget | None:
        span = self.span(prompt)
        return None if span is None else ThinkingBudget(span, num_tokens, self.ending)


def thinking_of(
    tokens: ReasoningTokens | None, prompt: str, num_tokens: int | None
) -> tuple[ThinkingSpan | None, ThinkingBudget | None]:
    """Where the answer's reasoning is, and its bound. InvalidParameterError for a bound on what is not known."""
    if tokens is None:
        if num_tokens is not None:
            raise InvalidParameterError(
                "thinking_token_budget needs a model whose reasoning this server recognises; its chat template does "
                "not tell: leave it out, or start the server with --reasoning-parser",
                "thinking_token_budget",
            )
        return None, None
    return tokens.span(prompt), None if num_tokens is None else tokens.budget(prompt, num_tokens)


def _ids(text: str, tokenizer: Tokenizer) -> Ids:
    """The one token that is `text`, if there is one: encoders may put a blank before it."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    named = tokenizer.id_of(text)
    return ids if named is None else (named,)
