"""Pieces of OpenAI's JSON that completions and chat share: usage, token strings, logprobs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nvfp4_runtime.engine.messages import TokenLogprob
from nvfp4_runtime.text.tokenizer import Tokenizer
from server.generation import ChoiceState

MIN_LOGPROB = -9999.0  # JSON has no -inf; vLLM's floor


def clamp(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def usage_of(choices: Iterable[ChoiceState], n: int, with_details: bool) -> dict[str, Any]:
    """Token counts of one answer; a prompt counts once, however many choices it has.

    completion_tokens_details is null where nothing is known of the model's reasoning.
    """
    choices = list(choices)
    prompt = sum(len(choice.job.prompt_token_ids) for choice in choices[::n])
    completion = sum(choice.num_tokens for choice in choices)
    cached = {
        "cached_tokens": sum(choice.num_cached_tokens for choice in choices[::n]),
        "created_cache_tokens": None,
        "multimodal_tokens": None,
    }
    reasoning = [count for choice in choices if (count := choice.num_reasoning_tokens) is not None]
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": cached if with_details else None,
        "completion_tokens_details": {"reasoning_tokens": sum(reasoning)} if reasoning else None,
    }


class TokenNames:
    """Token ids as strings, or as "token_id:N" where the request wants them so."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def chat_logprobs(self, entries: Iterable[TokenLogprob], num_top: int, listed: bool = False) -> dict[str, Any]:
        """Chat's `logprobs`: one entry per token, each with the `num_top` most likely tokens.

        `listed`: the request listed the tokens it wants instead (logprob_token_ids); they follow the token itself.
        """
        content = []
        for entry in entries:
            own = (entry.token_id, entry.logprob)
            top = [own, *(o for o in entry.top if o[0] != own[0])] if listed else entry.top[:num_top]
            content.append(self._entry(*own) | {"top_logprobs": [self._entry(*other) for other in top]})
        return {"content": content}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self(token_id),
            "logprob": clamp(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def prompt_logprobs(self, entries: Iterable[TokenLogprob | None], num_top: int) -> list[dict[str, Any] | None]:
        """vLLM's prompt_logprobs: per prompt token a map of ids; null for the first token."""
        return [None if entry is None else self._ranked(entry, num_top) for entry in entries]

    def _ranked(self, entry: TokenLogprob, num_top: int) -> dict[str, Any]:
        ranked = {entry.token_id: (entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1):
            ranked.setdefault(token_id, (logprob, rank))
        return {
            str(token_id): {
                "logprob": clamp(logprob),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, (logprob, rank) in ranked.items()
        }


class CompletionLogprobs:
    """The completions endpoint's `logprobs`, with text offsets that run on from piece to piece of a choice."""

    def __init__(self, names: TokenNames, num_top: int | None) -> None:
        """`num_top` None: all that an entry lists (logprob_token_ids)."""
        self._names = names
        self._num_top = num_top
        self._offset = 0

    def of(self, entries: Iterable[TokenLogprob | None], first_token_id: int | None = None) -> dict[str, Any]:
        """`first_token_id` names the prompt's first token, which has no logprob (echo)."""
        found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for entry in entries:
            if entry is None:
                assert first_token_id is not None
                name, logprob, top = self._names(first_token_id), None, None
            else:
                name, logprob = self._names(entry.token_id), clamp(entry.logprob)
                top = {name: logprob}
                for token_id, other in entry.top[: self._num_top]:
                    top.setdefault(self._names(token_id), clamp(other))
            found["text_offset"].append(self._offset)
            found["token_logprobs"].append(logprob)
            found["tokens"].append(name)
            found["top_logprobs"].append(top)
            self._offset += len(name)
        return found
