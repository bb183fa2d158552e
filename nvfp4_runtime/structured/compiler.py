"""GrammarCompiler: from a StructuredSpec to a matcher, cached. The only module that imports llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.grammars import grammar_text
from nvfp4_runtime.structured.matcher import GrammarState, first_line
from nvfp4_runtime.structured.spec import StructuredSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_BYTES = 128 << 20
# The library bounds time and memory but recurses over chained rules: some thousand of them overflow the stack. In so
# many bytes there is no room for them; longer grammars are tried in a process of their own first.
DIRECT_BYTES = 2048
DIRECT_CHOICE_BYTES = 64 << 10  # a list of words chains nothing; so many take 0.2 s
# What a compiled grammar is taken to need in memory. Single ones by `python -m nvfp4_runtime.structured.bench`: a
# quarter; 200 of those that `loadtest.storms grammars` makes, with the lexer states they have grown: 1 MiB on average.
GRAMMAR_BYTES = 1 << 20
BYTES_PER_SOURCE_BYTE = 32
# Bounds of the library's work. States: each holds 0.5 to 1.1 kB in a request's own lexer, and a JSON string with a
# maxLength takes nine per character.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
INSTALL = "structured output needs the package llguidance: pip install llguidance"


@dataclass(frozen=True)
class Vocabulary:
    """Where the tokens are: a tokenizer.json, or the tokens themselves (the simulated engine has no files)."""

    size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Path | None = None
    tokens: tuple[bytes, ...] = ()
    special: tuple[int, ...] = ()


class _ByteTokens:
    """What LLTokenizer asks of a tokenizer that is no file."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.eos_token_id = vocabulary.eos_token_ids[0] if vocabulary.eos_token_ids else None
        self.bos_token_id = None
        self.special_token_ids = list(vocabulary.special)
        self._ids = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[data[i : i + 1]] for i in range(len(data))]


class GrammarCompiler:
    """Compiles and remembers. Safe to call from several threads; compiling drops the interpreter lock.

    Raises InvalidParameterError for a grammar that is wrong or beyond the limits: the next time from memory.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        trial: Callable[[StructuredSpec], str | None] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`trial` says why a grammar that `needs_trial` cannot be used, None if it can."""
        self._vocabulary = vocabulary
        self._trial = trial
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._limits: Any = None
        self._special: dict[str, int] | None = None
        self._cache: OrderedDict[bytes, tuple[LLMatcher | str, int]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self.cached_bytes = 0

    def warm_up(self) -> None:
        """Import the library and read the tokenizer now: some 0.1 to 0.5 s that the first request else waits."""
        self._load()

    def knows(self, spec: StructuredSpec) -> bool:
        """Whether `state` will answer at once."""
        with self._lock:
            return spec.grammar_key in self._cache

    def needs_trial(self, spec: StructuredSpec) -> bool:
        """Whether `spec` is compiled in a process of its own first, where it may take longer than others."""
        bound = DIRECT_CHOICE_BYTES if spec.kind == "choice" else DIRECT_BYTES
        return self._trial is not None and len(spec.value) > bound

    def state(self, spec: StructuredSpec) -> GrammarState:
        """A fresh state for one request, compiling if need be."""
        matcher = self.compile(spec)
        tokenizer = self._load()
        eos = dict.fromkeys([tokenizer.eos_token, *self._vocabulary.eos_token_ids])
        reasoning = spec.reasoning
        opening = None
        if reasoning is not None and reasoning.start and not reasoning.is_open:
            found = tokenizer.tokenize_str(reasoning.start, parse_special=True)
            opening = found[0] if len(found) == 1 else None
        return GrammarState(
            matcher.deep_copy(),
            -(-tokenizer.vocab_size // 32),
            [token_id for token_id in eos if token_id < tokenizer.vocab_size],
            self._token_bytes,
            reasoning,
            opening,
        )

    def compile(self, spec: StructuredSpec) -> LLMatcher:
        """The matcher at its start, shared: copy it before use."""
        key = spec.grammar_key
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return _matcher_or_raise(self._cache[key][0], spec)
        made = self._make(spec)
        size = GRAMMAR_BYTES + BYTES_PER_SOURCE_BYTE * len(key) if not isinstance(made, str) else len(key) + len(made)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = made, size
                self.cached_bytes += size
            while self.cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, (_, gone) = self._cache.popitem(last=False)
                self.cached_bytes -= gone
        return _matcher_or_raise(made, spec)

    def _make(self, spec: StructuredSpec) -> LLMatcher | str:
        """A matcher, or why there is none."""
        tokenizer = self._load()
        import llguidance

        if self._trial is not None and self.needs_trial(spec) and (reason := self._trial(spec)) is not None:
            return reason
        try:
            grammar = grammar_text(spec, self._special_tokens)
        except InvalidParameterError as error:
            return str(error).removeprefix(f"{spec.param} ")
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # states of the lexer that every request starts with are made here, once
        return f"cannot be used: {first_line(matcher.get_error())}" if matcher.is_error() else matcher

    def _load(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer, self._limits = _load_tokenizer(self._vocabulary)
            return self._tokenizer

    def _special_tokens(self) -> dict[str, int]:
        """Text -> id; those that end an answer are no part of one."""
        if self._special is None:
            tokenizer = self._load()
            ids = filter(tokenizer.is_special_token, range(tokenizer.vocab_size))
            eos = {tokenizer.eos_token, *self._vocabulary.eos_token_ids}
            found = {tokenizer.decode_bytes([i]).decode("utf-8", "replace"): i for i in ids if i not in eos}
            # rows of the model without a token are called <[id]>
            self._special = {text: token_id for text, token_id in found.items() if text != f"<[{token_id}]>"}
        return self._special

    def _token_bytes(self, token_id: int) -> bytes:
        assert self._tokenizer is not None
        return self._tokenizer.decode_bytes([token_id])


def _load_tokenizer(vocabulary: Vocabulary) -> tuple[LLTokenizer, Any]:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidParameterError(INSTALL) from error
    source: Any = str(vocabulary.tokenizer) if vocabulary.tokenizer is not None else _ByteTokens(vocabulary)
    eos = vocabulary.eos_token_ids[0] if vocabulary.eos_token_ids else None
    try:
        try:
            tokenizer = llguidance.LLTokenizer(source, n_vocab=vocabulary.size, eos_token=eos)
        except ValueError:  # more tokens than the model has rows; those beyond can never be drawn
            tokenizer = llguidance.LLTokenizer(source, eos_token=eos)
    except ValueError as error:
        raise InvalidParameterError(f"this model's tokenizer does not allow structured output: {error}") from error
    return tokenizer, llguidance.LLParserLimits(**LIMITS)


def _matcher_or_raise(made: LLMatcher | str, spec: StructuredSpec) -> LLMatcher:
    if isinstance(made, str):
        raise spec.refused(made)
    return made
