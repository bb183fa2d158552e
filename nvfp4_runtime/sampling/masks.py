"""Grammar masks of one step, computed beside the model's forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from nvfp4_runtime.sampling.logits import FloatRow
from nvfp4_runtime.sampling.state import SamplingState
from nvfp4_runtime.structured.matcher import GrammarState

Words = npt.NDArray[np.int32]


class Masks:
    """The masks of one step; `apply` waits for them. Rows without a grammar have none."""

    def __init__(self, rows: dict[GrammarState, Words], done: Future[None]) -> None:
        self._rows = rows
        self._done = done

    def wait(self) -> None:
        """Until every mask of the step is there."""
        self._done.result()

    def apply(self, row: FloatRow, grammar: GrammarState) -> FloatRow:
        """A copy of `row` with -Inf wherever the grammar allows no token."""
        self.wait()
        words = self._rows[grammar]
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(row)].view(bool)
        masked = np.full(len(row), -np.inf, dtype=np.float32)
        np.copyto(masked[: len(allowed)], row[: len(allowed)], where=allowed)
        return masked


class MaskWorker:
    """One thread that fills masks. It holds the interpreter lock only between rows, so forward and masks overlap."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, states: Sequence[SamplingState]) -> Masks | None:
        """Begin the masks of the constrained among `states`; None when there is none."""
        grammars = [s.grammar for s in states if s.grammar is not None and s.grammar.applies]
        if not grammars:
            return None
        table = np.zeros((len(grammars), max(grammar.num_words for grammar in grammars)), dtype=np.int32)
        rows = dict(zip(grammars, table, strict=True))
        return Masks(rows, self._pool.submit(_fill, rows))


def _fill(rows: dict[GrammarState, Words]) -> None:
    for grammar, words in rows.items():
        grammar.fill(words)
