"""Grammar masks of one step, computed beside the model's forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nvfp4_runtime.sampling.logits import FloatRow, TokenIds
from nvfp4_runtime.sampling.state import SamplingState
from nvfp4_runtime.structured.matcher import GrammarState


@dataclass(frozen=True, slots=True)
class Mask:
    """What one grammar allows next, as the shorter of two lists, so that applying it costs little.

    ids      int64 [n]  ascending
    allowed  these tokens alone may come; False: all but these
    size     how many tokens the grammar knows; rows may be longer, and what is beyond may not come
    """

    ids: TokenIds
    allowed: bool
    size: int

    def apply(self, row: FloatRow) -> FloatRow:
        """A copy of `row` with -Inf wherever no token may come."""
        ids = self.within(len(row))
        if self.allowed:
            masked = np.full_like(row, -np.inf)
            masked[ids] = row[ids]
            return masked
        masked = row.copy()
        masked[ids] = -np.inf
        masked[self.size :] = -np.inf
        return masked

    def within(self, vocab_size: int) -> TokenIds:
        """`ids` below `vocab_size`: a tokenizer may have more tokens than the model has rows."""
        if len(self.ids) == 0 or self.ids[-1] < vocab_size:
            return self.ids
        return self.ids[: int(self.ids.searchsorted(vocab_size))]


class Masks:
    """The masks of one step, by grammar. Rows without a grammar have none."""

    def __init__(self, done: Future[dict[GrammarState, Mask]]) -> None:
        self._done = done

    def wait(self) -> None:
        """Until every mask of the step is there."""
        self._done.result()

    def of(self, grammar: GrammarState) -> Mask:
        return self._done.result()[grammar]


class MaskWorker:
    """One thread that makes masks. While the model computes nobody wants the interpreter lock, so both get on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, states: Sequence[SamplingState]) -> Masks | None:
        """Begin the masks of the constrained among `states`; None when there is none."""
        grammars = [s.grammar for s in states if s.grammar is not None and s.grammar.applies]
        return Masks(self._pool.submit(_masks, grammars)) if grammars else None


def _masks(grammars: Sequence[GrammarState]) -> dict[GrammarState, Mask]:
    words = np.zeros(max(grammar.num_words for grammar in grammars), dtype=np.int32)
    return {grammar: _mask(grammar, words[: grammar.num_words]) for grammar in grammars}


def _mask(grammar: GrammarState, words: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Mask:
    grammar.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)
    few = 2 * int(np.count_nonzero(bits)) < len(bits)
    return Mask(np.flatnonzero(bits if few else ~bits), few, len(bits))
