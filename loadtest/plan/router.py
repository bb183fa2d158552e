"""Which replica gets a request: whoever has least to do before its first token, counting what is cached there.

As gateways for inference do it, without knowing how long answers will be: the router remembers which beginnings of
prompts it sent where, in pieces of PIECE tokens, and what has not begun to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PIECE = 64


@dataclass
class Router:
    """For `count` replicas.

    waiting        prompt tokens sent to each that were not answered yet, those taken to be cached left out
    running        requests at each that have not ended
    row_tokens     what a running request delays others by, in prompt tokens: its decode rows share every step
    """

    count: int
    row_tokens: float = 16.0
    waiting: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    _seen: dict[int, dict[int, None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = [0.0] * self.count
        self.running = [0] * self.count

    def choose(self, prompt: Sequence[int]) -> tuple[int, float]:
        """The replica, and how many tokens it is taken to have to compute; `answered` gives those back."""
        pieces = self._pieces(prompt)
        known: dict[int, int] = {}  # replica -> pieces of this prompt that it saw
        for depth, piece in enumerate(pieces, 1):
            if not (holders := self._seen.get(piece)):
                break
            for replica in holders:
                known[replica] = depth
        total = float(len(prompt))
        idlest = min(range(self.count), key=self._busy)
        best, cost = idlest, self._busy(idlest) + total - PIECE * known.get(idlest, 0)
        for replica, depth in known.items():
            if (other := self._busy(replica) + total - PIECE * depth) < cost:
                best, cost = replica, other
        for piece in pieces:
            self._seen.setdefault(piece, {})[best] = None
        work = max(1.0, total - PIECE * known.get(best, 0))
        self.waiting[best] += work
        self.running[best] += 1
        return best, work

    def answered(self, replica: int, work: float) -> None:
        """The request's first token has come."""
        self.waiting[replica] -= work

    def ended(self, replica: int) -> None:
        self.running[replica] -= 1

    def _busy(self, replica: int) -> float:
        return self.waiting[replica] + self.row_tokens * self.running[replica]

    def _pieces(self, prompt: Sequence[int]) -> list[int]:
        """A chained hash for every whole piece."""
        found: list[int] = []
        chained = 0
        for start in range(0, len(prompt) - PIECE + 1, PIECE):
            chained = hash((chained, *prompt[start : start + PIECE]))
            found.append(chained)
        return found
