"""Grammar masks, made beside everything else a step does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

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


class _Job:
    """Masks that are being made. Lighter than a Future, which would cost as much as a mask."""

    __slots__ = ("_done", "_failure", "_grammars", "_masks")

    def __init__(self, grammars: Sequence[GrammarState]) -> None:
        self._grammars = grammars
        self._masks: dict[GrammarState, Mask] = {}
        self._failure: Exception | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        try:
            words = np.zeros(max(grammar.num_words for grammar in self._grammars), dtype=np.int32)
            for grammar in self._grammars:
                self._masks[grammar] = _mask(grammar, words[: grammar.num_words])
        except Exception as error:  # noqa: BLE001 - raised again where the mask is wanted
            self._failure = error
        finally:
            self._done.release()

    def wait(self) -> dict[GrammarState, Mask]:
        with self._done:
            if self._failure is not None:
                raise self._failure
            return self._masks


class Masks:
    """The masks of one step, by grammar. Rows without a grammar have none."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def wait(self) -> None:
        """Until every mask of the step is there."""
        self._job.wait()

    def of(self, grammar: GrammarState) -> Mask:
        return self._job.wait()[grammar]


class MaskWorker:
    """One thread that makes masks while the model computes; the library drops the interpreter lock, as the kernels do.

    Tried, and no better beyond the noise of the machine: to begin as soon as a token is chosen, and to make masks in
    the engine's own thread.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, states: Sequence[SamplingState]) -> Masks | None:
        """Begin the masks of the constrained among `states`; None when there is none."""
        grammars = [s.grammar for s in states if s.grammar is not None and s.grammar.applies]
        return Masks(self._submit(grammars)) if grammars else None

    def _submit(self, grammars: Sequence[GrammarState]) -> _Job:
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._queue,), name="masks", daemon=True)
            self._thread.start()
        job = _Job(grammars)
        self._queue.put(job)
        return job


def _work(queue: SimpleQueue[_Job]) -> None:
    while True:
        queue.get().run()


def _mask(grammar: GrammarState, words: npt.NDArray[np.int32]) -> Mask:
    grammar.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)
    few = 2 * int(np.count_nonzero(bits)) < len(bits)
    return Mask(np.flatnonzero(bits if few else ~bits), few, len(bits))
