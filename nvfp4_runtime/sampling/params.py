"""SamplingParams: what a request asks of the sampler. Torch-free, and a wire message as it is."""

from __future__ import annotations

import math

import msgspec

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.structured.spec import StructuredSpec
from nvfp4_runtime.structured.thinking import ThinkingBudget

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop. Ranges are vLLM's; `validate` names the field that is out of range.

    temperature 0 is greedy. top_k 0 or -1 is off. seed None: drawn by the engine, so output differs per call.
    logprobs: how many alternatives to report beside the sampled token; None for no logprobs at all.
    prompt_logprobs: the same for each prompt token.
    structured: the form the text must have.
    logprob_token_ids: report these tokens beside the sampled one instead of the likeliest; needs logprobs.
    allowed_token_ids: only these may be sampled; None for all.
    bad_words_token_ids: the last token of each sequence is forbidden where the output ends with those before it.
    thinking: how long the model may reason; the tokens that end it are not subject to the lists above.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredSpec | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingBudget | None = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise InvalidParameterError naming the first field that has another type or is out of range."""
        try:  # msgspec looks at types when it decodes, not when a struct is made
            msgspec.convert(msgspec.to_builtins(self), SamplingParams)
        except (msgspec.ValidationError, TypeError) as error:
            reason, _, path = str(error).partition(" - at `$.")
            param = path.rstrip("`").partition("[")[0] or None
            raise InvalidParameterError(f"{param or 'sampling parameters'}: {reason}", param) from error
        _check(0 <= self.temperature <= 2, "temperature", self.temperature, "a number in [0, 2]")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _check(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (off), or a positive integer")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        _check(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "a positive number"
        )
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "a number in [-2, 2]")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "a number in [-2, 2]")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer >= 0")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        _check(
            self.seed is None or -MAX_SEED - 1 <= self.seed <= MAX_SEED, "seed", self.seed, "a 64-bit signed integer"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"an integer in [0, {MAX_LOGPROBS}]")
        for token_id, bias in self.logit_bias.items():
            _check(-100 <= bias <= 100, "logit_bias", bias, "biases in [-100, 100]")
            _check_token(token_id, vocab_size, "logit_bias")
        if self.structured is not None:
            self.structured.validate()
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_token(token_id, vocab_size, name)
        self._validate_token_lists()
        if self.thinking is not None:
            name, span = "thinking_token_budget", self.thinking.span
            _check(self.thinking.num_tokens >= 0, name, self.thinking.num_tokens, "an integer >= 0")
            marked = span.opens and span.closes and self.thinking.ending
            _check(bool(marked), name, "an empty one", "given with markers of at least one token")
            for token_id in self.thinking.token_ids:
                _check_token(token_id, vocab_size, name)

    def _validate_token_lists(self) -> None:
        allowed, scored = self.allowed_token_ids, self.logprob_token_ids
        _check(allowed is None or len(allowed) > 0, "allowed_token_ids", "none", "at least one token id")
        if scored is not None:
            _check(self.logprobs is not None, "logprob_token_ids", "it alone", "given together with logprobs")
            _check(
                1 <= len(scored) <= MAX_LOGPROB_TOKEN_IDS,
                "logprob_token_ids",
                f"{len(scored)}",
                f"1 to {MAX_LOGPROB_TOKEN_IDS} token ids",
            )
        for word in self.bad_words_token_ids:
            _check(len(word) > 0, "bad_words", "one", "words of at least one token")


def _check(ok: bool, param: str, found: object, expected: str) -> None:
    if not ok:
        raise InvalidParameterError(f"{param} must be {expected}, got {found}", param)


def _check_token(token_id: int, vocab_size: int | None, param: str) -> None:
    limit = vocab_size if vocab_size is not None else 2**31
    _check(0 <= token_id < limit, param, token_id, f"token ids in [0, {limit})")
