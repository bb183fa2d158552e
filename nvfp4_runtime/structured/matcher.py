"""GrammarState: where one request stands in its grammar. The library is whoever made the matcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nvfp4_runtime.structured.spec import ReasoningSpan

if TYPE_CHECKING:  # the server imports this module and needs no numpy
    import numpy as np
    import numpy.typing as npt

    Words = npt.NDArray[np.int32]


class Matcher(Protocol):
    """What is used of llguidance's LLMatcher; see there."""

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None: ...
    def consume_token(self, sampled_token: int) -> bool: ...
    def is_stopped(self) -> bool: ...
    def is_accepting(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...
    def deep_copy(self) -> Any: ...


class GrammarState:
    """One request's grammar: masks out, tokens in. It lives as long as the request, preempted or not.

    complete   the text is whole and nothing can follow
    error      the grammar met one of its limits: the request has to end
    """

    def __init__(
        self,
        matcher: Matcher,
        num_words: int,
        eos_token_ids: Sequence[int],
        token_bytes: Callable[[int], bytes],
        reasoning: ReasoningSpan | None = None,
        opening_token: int | None = None,
    ) -> None:
        """`eos_token_ids`: the first is the matcher's own, all of them may end a complete text."""
        self._matcher = matcher
        self.num_words = num_words
        self._eos = tuple(eos_token_ids)
        self._token_bytes = token_bytes
        self._end = reasoning.end.encode() if reasoning is not None else b""
        self._tail = b""
        self._reasoning = reasoning is not None and reasoning.is_open
        self._opening = opening_token if reasoning is not None and not reasoning.is_open else None
        self.complete = False
        self.error: str | None = None

    @property
    def applies(self) -> bool:
        """Whether the next token is constrained: not while the model reasons."""
        return not self._reasoning

    def fill(self, words: Words) -> None:
        """Write the mask of the next token: bit i of the whole is 1 where token i may come. Thread-safe for one caller.

        words   int32 [W]   W * 32 covers the vocabulary
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, self.num_words * 4)
        if self._matcher.is_error():
            self.error = first_line(self._matcher.get_error())
            return
        if self._eos and _bit(words, self._eos[0]):
            for token_id in self._eos[1:]:
                _set(words, token_id)
        if self._opening is not None:
            _set(words, self._opening)

    def accept(self, token_id: int) -> None:
        """Advance by the token that was chosen."""
        if self._reasoning:
            self._tail = (self._tail + self._token_bytes(token_id))[-4096:]
            if self._end in self._tail:
                self._reasoning, self._tail = False, b""
            else:
                self._tail = self._tail[-len(self._end) :]
            return
        opening, self._opening = self._opening, None
        if token_id == opening:
            self._reasoning = True
            return
        if token_id in self._eos:
            self.complete = True  # the mask allows it only there
            return
        if not self._matcher.consume_token(token_id):
            self.error = first_line(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self.complete = True


def first_line(message: str) -> str:
    """What the library says of an error, without the grammar it repeats below."""
    return message.strip().splitlines()[0][:300] if message.strip() else "the library gives no reason"


def _bit(words: Words, token_id: int) -> bool:
    return bool((int(words[token_id >> 5]) >> (token_id & 31)) & 1)


def _set(words: Words, token_id: int) -> None:
    words.view("uint32")[token_id >> 5] |= 1 << (token_id & 31)
