"""What is asked, and what came of it. Times are seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class Call:
    """One chat request for exactly `max_tokens` tokens (where the server knows `ignore_eos`)."""

    messages: Messages
    max_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Calls of one user, each sent when the one before has been answered and `think_seconds` have passed.

    at             when the first call is due, in an open loop; a closed loop takes the next one when it has room
    think_seconds  before each call but the first

    Turns are scripted, the server's answers among them: every server gets the same prompts.
    """

    calls: tuple[Call, ...]
    at: float = 0.0
    think_seconds: float = 0.0


@dataclass
class Outcome:
    """One call as its client saw it.

    due                when it should have been sent; every duration below counts from here
    sent               when its bytes were handed to the system
    arrivals           of every event that brought text
    ended              of the answer's last byte, or of whatever ended it
    completion_tokens  by the server's usage; None: it gave none
    failure            why there is no whole answer, in few words; None: there is one
    answer_id          by which the server knows it
    """

    due: float
    max_tokens: int = 0
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    failure: str | None = None
    answer_id: str = ""

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.due

    @property
    def e2e(self) -> float:
        return self.ended - self.due

    @property
    def late(self) -> float:
        """How long the client took to send it."""
        return self.sent - self.due

    @property
    def gaps(self) -> list[float]:
        """Between events that brought text. TTFT is none of them."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first, by the count of the server; None for answers of one token."""
        if self.completion_tokens is None or self.completion_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)
