"""Token ids to text while they arrive: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from nvfp4_runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes; tokens that do not make one by then never will.
MAX_HELD_TOKENS = 4
# Context before the first new token, so that decoders which look at the left neighbour (spaces) see one.
CONTEXT_TOKENS = 6


class Decoder(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class ByteDecoder:
    """For byte-level tokenizers: tokens are bytes, so a UTF-8 decoder does it, exactly and in linear time."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, kept: frozenset[int] = frozenset()
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole_text = tokenizer.whole_text
        self._skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waits = False  # bytes of an unfinished character

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; bytes of an unfinished character wait."""
        if token_id in self._skipped:
            return ""
        if not self._waits and (text := self._whole_text(token_id)) is not None:
            return text
        text = self._utf8.decode(self._token_bytes(token_id))
        self._waits = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """What was still waiting: U+FFFD for an unfinished character."""
        self._waits = False
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other tokenizer (sentencepiece, byte fallback, WordPiece): decode a short window twice, emit the rest.

    The window starts with the last text emitted, so spaces between words come out as in a whole decode. Byte-fallback
    tokens do not go through the tokenizer: it spoils a whole run of them for one byte that makes no character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        spaces_between_special_tokens: bool = True,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._kept = kept if skip_special_tokens else frozenset()
        self._skip = skip_special_tokens
        self._joins_specials = not (skip_special_tokens or spaces_between_special_tokens)
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._new = len(self._ids)  # ids before this index have been emitted
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._kept:  # between two texts: the tokenizer would leave it out
            shown = self.flush() + self._tokenizer.token_text(token_id)
            self._ids, self._new = [], 0
            return shown
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            text = self._pending()
            self._ids, self._new = [token_id], 1
            return text + self._utf8.decode(bytes([byte]))
        broken = self._utf8.decode(b"", final=True)  # an unfinished character stays so
        return broken + self._push_text(token_id)

    def _push_text(self, token_id: int) -> str:
        follows_special = bool(self._ids) and self._ids[-1] in self._tokenizer.special_ids
        self._ids.append(token_id)
        if self._joins_specials and follows_special and token_id in self._tokenizer.special_ids:
            self._advance()
            return self._tokenizer.token_text(token_id)
        text = self._pending()
        if not text or (text.endswith(REPLACEMENT) and len(self._ids) - self._new <= MAX_HELD_TOKENS):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._pending() + self._utf8.decode(b"", final=True)
        self._new = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._new], skip_special_tokens=self._skip)
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)[len(before) :]

    def _advance(self) -> None:
        self._ids = self._ids[self._new :]
        self._new = len(self._ids)


class StopScanner:
    """Holds back text that may become a stop string, and cuts at the one that is complete first.

    The cut does not depend on how the text was split into pieces: the earliest end wins, then the longest string.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Text that can be shown. Unarmed, stop strings that end within `text` do not count (min_tokens).

        Once `found` is set, nothing more comes out.
        """
        if not self._stop or self.found is not None:
            return "" if self.found is not None else text
        first_new = len(self._held)
        self._held += text
        if armed and (match := self._first_match(first_new)) is not None:
            start, self.found = match
            shown = self._held[: start + len(self.found)] if self._include else self._held[:start]
            self._held = ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown

    def _first_match(self, first_new: int) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self._held.find(stop, max(0, first_new - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return (best[1], best[2]) if best is not None else None


class Detokenizer:
    """One choice's text: decoder and stop scanner in a row.

    stop          stop strings; `stopped_by` names the one found
    spaces_between_special_tokens  False: none, where the tokenizer's decoder writes one; has no effect on others
    min_tokens    stop strings that are complete within the first `min_tokens` tokens do not count
    prompt_ids    left context, for decoders that need it
    kept_special_ids  special tokens that are shown although others are skipped
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
        kept_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder: Decoder = (
            ByteDecoder(tokenizer, skip_special_tokens, kept_special_ids)
            if tokenizer.is_byte_level
            else WindowDecoder(
                tokenizer, skip_special_tokens, prompt_ids, spaces_between_special_tokens, kept_special_ids
            )
        )
        self._scanner = StopScanner(stop, include_stop_str_in_output)
        self._scans = bool(stop)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        return self._scanner.found

    def push(self, token_id: int) -> str:
        """Text that is certain and may be shown after this token."""
        self.num_tokens += 1
        text = self._decoder.push(token_id)
        return self._scanner.push(text, armed=self.num_tokens > self._min_tokens) if self._scans else text

    def push_all(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """As `push` of one after the other, up to one that completes a stop string: text and how many."""
        text = ""
        for i, token_id in enumerate(token_ids, start=1):
            text += self.push(token_id)
            if self._scanner.found is not None:
                return text, i
        return text, len(token_ids)

    def skip(self) -> None:
        """Count a token without showing it (the stop token that ended the request)."""
        self.num_tokens += 1

    def flush(self) -> str:
        """The rest, after the last token; a stop string may still be found in it."""
        shown = self._scanner.push(self._decoder.flush(), armed=self.num_tokens > self._min_tokens)
        return shown + self._scanner.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with, the whole stop string excepted."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
