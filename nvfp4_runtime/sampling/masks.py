"""Grammar masks, made beside everything else a step does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from nvfp4_runtime.sampling.logits import FloatRow, TokenIds
from nvfp4_runtime.sampling.state import SamplingState
from nvfp4_runtime.structured.matcher import GrammarState


class Mask:
    """What one grammar allows next.

    words  int32 [W]  bit i of the whole: token i may come
    size   how many tokens the grammar knows; rows may be longer, and what is beyond may not come
    """

    __slots__ = ("_allowed", "_ids", "_words", "size")

    def __init__(self, words: npt.NDArray[np.int32]) -> None:
        self._words = words
        self.size = 32 * len(words)
        self._ids: TokenIds | None = None
        self._allowed = False

    def permits(self, token_id: int) -> bool:
        return token_id < self.size and bool(int(self._words[token_id >> 5]) >> (token_id & 31) & 1)

    def make_list(self) -> None:
        """Find the tokens that may come, or those that may not, whichever are fewer: applying these costs little."""
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little").view(bool)
        self._allowed = 2 * int(np.count_nonzero(bits)) < len(bits)
        self._ids = np.flatnonzero(bits if self._allowed else ~bits)

    def few(self, vocab_size: int) -> TokenIds | None:
        """The tokens below `vocab_size` that may come, ascending; None where it is most of them.

        A tokenizer may have more tokens than the model has rows.
        """
        ids = self._listed()
        if not self._allowed:
            return None
        if len(ids) == 0 or ids[-1] < vocab_size:
            return ids
        return ids[: int(ids.searchsorted(vocab_size))]

    def apply(self, row: FloatRow) -> FloatRow:
        """A copy of `row` with -Inf wherever no token may come."""
        few = self.few(len(row))
        if few is not None:
            masked = np.full_like(row, -np.inf)
            masked[few] = row[few]
            return masked
        ids = self._listed()
        masked = row.copy()
        masked[ids[: int(ids.searchsorted(len(row)))]] = -np.inf
        masked[self.size :] = -np.inf
        return masked

    def _listed(self) -> TokenIds:
        if self._ids is None:
            self.make_list()
        assert self._ids is not None
        return self._ids


class _Job:
    """Masks that are being made. Lighter than a Future, which would cost as much as a mask."""

    __slots__ = ("_done", "_failure", "_masks", "_states")

    def __init__(self, states: Sequence[SamplingState]) -> None:
        self._states = states
        self._masks: dict[GrammarState, Mask] = {}
        self._failure: Exception | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        try:
            for state in self._states:
                assert state.grammar is not None
                words = np.zeros(state.grammar.num_words, dtype=np.int32)
                state.grammar.fill(words)
                mask = self._masks[state.grammar] = Mask(words)
                if state.params.temperature > 0:  # without, the likeliest token is often allowed, and no list is needed
                    mask.make_list()
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

    Tried, and no better beyond the noise of the machine (batch 1, 8, 32 on two cores): to begin as soon as a token is
    chosen, to make masks in the engine's own thread, and to have the library make a batch's in threads of its own.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, states: Sequence[SamplingState]) -> Masks | None:
        """Begin the masks of the constrained among `states`; None when there is none."""
        constrained = [state for state in states if state.grammar is not None and state.grammar.applies]
        return Masks(self._submit(constrained)) if constrained else None

    def _submit(self, states: Sequence[SamplingState]) -> _Job:
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._queue,), name="masks", daemon=True)
            self._thread.start()
        job = _Job(states)
        self._queue.put(job)
        return job


def _work(queue: SimpleQueue[_Job]) -> None:
    while True:
        queue.get().run()
