"""What the sampler is told of a request, and what it answers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.structured.matcher import GrammarState
from nvfp4_runtime.structured.thinking import ThinkingState


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's place in the model's own distribution, before any bias, penalty, temperature or filter, but over what
    the request's grammar allows.

    logprob  natural logarithm of its probability; -inf where the logit is -inf
    rank     1 = most likely; equal logits rank by lower id first
    top      the most likely (token_id, logprob), best first, same order as `rank`; or the tokens that were asked for
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One request's answer.

    token_id  the chosen token, or -1 when `finite` is False
    logprob   present when the request asked for logprobs and a token was chosen
    finite    False: no token can be chosen, because the row holds NaN or +Inf, or nothing in it is above -Inf.
              That request has to end with an error; the other rows of the batch are not touched by it.
    error     why no token can be chosen, where it is not the numbers' fault
    """

    token_id: int
    logprob: Logprob | None = None
    finite: bool = True
    error: str | None = None


@dataclass(eq=False)
class SamplingState:
    """A running request as the sampler sees it. Compared by identity: the sampler keeps caches per object.

    seed              resolved seed, 64 bits, signed or not
    output_token_ids  live reference; the engine appends what was sampled and changes nothing before that.
                      Whoever replaces or shortens a list makes a new SamplingState.
    grammar           the request's place in its grammar; the sampler advances it with every token it chooses
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: tuple[int, ...] = ()
    grammar: GrammarState | None = None
    edits_logits: bool = field(init=False)
    penalises: bool = field(init=False)
    _thinking: ThinkingState | None = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self._thinking = None if p.thinking is None else ThinkingState(p.thinking.span, p.thinking)
        self.penalises = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        restricts = p.allowed_token_ids is not None or bool(p.bad_words_token_ids)
        self.edits_logits = self.penalises or bool(p.logit_bias) or restricts

    @property
    def completing_bad_words(self) -> list[int]:
        """Tokens that would complete one of params.bad_words_token_ids now."""
        found = []
        for word in self.params.bad_words_token_ids:
            before = len(word) - 1
            if before == 0 or tuple(self.output_token_ids[-before:]) == word[:-1]:
                found.append(word[-1])
        return found

    @property
    def forced_token(self) -> int | None:
        """What comes next, the reasoning's budget being spent, whatever the logits say; a grammar has its way first."""
        if self._thinking is None or self.is_constrained:
            return None
        self._thinking.follow(self.output_token_ids)
        return self._thinking.forced

    def free_at(self, position: int) -> bool:
        """Whether output token `position` is certainly no forced one."""
        if self._thinking is None:
            return True
        self._thinking.follow(self.output_token_ids)
        return self._thinking.free_at(position)

    @property
    def is_constrained(self) -> bool:
        """The grammar has a say in the next token."""
        return self.grammar is not None and self.grammar.applies

    @property
    def awaits_min_tokens(self) -> bool:
        """EOS and stop tokens are still forbidden."""
        return len(self.output_token_ids) < self.params.min_tokens
