"""Where reasoning begins and ends among tokens, and how its length is bounded. Imports nothing but msgspec.

Markers are sequences of token ids, as the tokenizer writes them; in models that reason each is one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Ids = tuple[int, ...]


class ThinkingSpan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How reasoning is marked.

    opens    begins it
    closes   ends it
    is_open  the output begins inside it
    blanks   what may come before `opens`, which comes first or not at all, and once; None: it may come anywhere
    """

    opens: Ids
    closes: Ids
    is_open: bool
    blanks: Ids | None


class ThinkingBudget(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """At most `num_tokens` tokens of reasoning, markers not counted; then `ending` is written for the model."""

    span: ThinkingSpan
    num_tokens: int
    ending: Ids

    @property
    def token_ids(self) -> Ids:
        return self.span.opens + self.span.closes + self.ending + (self.span.blanks or ())


class ThinkingState:
    """One output, token by token.

    num_tokens  how many were reasoning, markers not counted
    """

    def __init__(self, span: ThinkingSpan, budget: ThinkingBudget | None = None) -> None:
        self._span = span
        self._budget = budget
        self._inside = span.is_open
        self._tail: Ids = ()  # the newest tokens of the reasoning, or of what may open it
        self._longest = max(len(span.opens), len(span.closes), len(budget.ending) if budget is not None else 0)
        self._due: Ids = ()
        self._seen = 0
        self._over_at: int | None = None
        self._count = 0
        self._end_if_spent()

    @property
    def num_tokens(self) -> int:
        return self._count

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if the budget is spent."""
        return self._due[0] if self._due else None

    def free_at(self, position: int) -> bool:
        """Whether output token `position` is certainly not forced, as far as the tokens before `position` - 1 tell.

        The one right before it may be unknown yet, and the answer must not depend on whether it is.
        """
        if self._budget is None or position < self._budget.num_tokens:
            return True
        return self._over_at is not None and self._over_at < position

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take what is new of the whole output so far."""
        for token_id in token_ids[self._seen :]:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        self._seen += 1
        if self._due:
            self._due = self._due[1:]
            if not self._due:
                self._close()
        elif self._inside:
            self._think(token_id)
        elif self._over_at is None:
            self._look_for_opening(token_id)

    def _think(self, token_id: int) -> None:
        closes = self._span.closes
        self._count += 1
        self._tail = (*self._tail, token_id)[-self._longest :]
        if self._tail[-len(closes) :] == closes:
            self._count -= len(closes)
            self._close()
        else:
            self._end_if_spent()

    def _close(self) -> None:
        self._inside, self._tail = False, ()
        if self._span.blanks is not None:
            self._over_at = self._seen

    def _look_for_opening(self, token_id: int) -> None:
        opens, blanks = self._span.opens, self._span.blanks
        if blanks is not None and not self._tail and token_id in blanks:
            return
        self._tail = (*self._tail, token_id)[-len(opens) :]
        if self._tail == opens:
            self._inside, self._tail = True, ()
            self._end_if_spent()
        elif blanks is not None and self._tail != opens[: len(self._tail)]:
            self._over_at = self._seen  # the answer itself

    def _end_if_spent(self) -> None:
        """Make the ending due; what the model has written of it already is not repeated."""
        if self._budget is None or not self._inside or self._count < self._budget.num_tokens:
            return
        ending = self._budget.ending
        begun = next((n for n in range(len(ending) - 1, 0, -1) if self._tail[-n:] == ending[:n]), 0)
        if self._count - begun >= self._budget.num_tokens:
            self._count -= begun
            self._due = ending[begun:]
