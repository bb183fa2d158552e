"""What completions and chat requests have in common: sampling, stopping, streaming, ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.sampling.params import MAX_LOGPROBS, SamplingParams
from server.protocol.fields import (
    MAX_STOP_CHARS,
    Count,
    Int,
    Number,
    RequestBody,
    ShortStr,
    StopStr,
    check_num_logprobs,
    note_unknown,
    token_biases,
)
from server.protocol.not_honoured import NOT_HONOURED, REPLACED
from server.structured import StructuredFields

MAX_STOP_STRINGS = 64
MAX_BEAMS = MAX_LOGPROBS // 2  # a step looks at the 2 n likeliest tokens of each beam
NOT_WITH_BEAM_SEARCH = (
    "stop",
    "stop_token_ids",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "logprob_token_ids",
    "thinking_token_budget",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(StructuredFields, RequestBody):
    """What completions and chat have in common. null means the default, everywhere."""

    prompt_field: ClassVar[str] = "prompt"  # what errors about the prompt name

    model: ShortStr | None = None
    max_tokens: Int | None = None
    n: Int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[Int, Field(ge=1)] = 1
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    use_beam_search: bool = False
    length_penalty: Number = 1.0
    best_of: Int | None = None
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: dict[ShortStr, Number] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[StopStr] = Field([])
    seed: Int | None = None
    stop: StopStr | list[StopStr] = Field([])
    stop_token_ids: list[Int] = Field([])
    include_stop_str_in_output: bool = False
    min_tokens: Int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: Int | None = None
    logprob_token_ids: list[Int] | None = None
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    thinking_token_budget: Count | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] = "left"
    priority: Int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    timeout: Number | None = None
    user: ShortStr | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives beside each sampled token; None for no logprobs."""
        raise NotImplementedError  # the two endpoints spell it differently: each request class says how

    def check(self, max_n: int) -> None:
        """Refuse what can be refused without the model. Raises InvalidParameterError naming the field."""
        self._check_extras()
        if self.stream_options is not None:
            note_unknown("stream_options.", self.stream_options)
        if not 1 <= self.n <= max_n:
            raise InvalidParameterError(f"n must be between 1 and {max_n}, got {self.n}", "n")
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError("stream_options is only allowed when stream is true", "stream_options")
        check_num_logprobs("prompt_logprobs", self.prompt_logprobs)
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidParameterError("prompt_logprobs cannot be had with stream: true", "prompt_logprobs")
        if self.best_of not in (None, self.n):
            raise InvalidParameterError(
                f"best_of must be equal to n ({self.n}), got {self.best_of}: this server returns every answer it makes",
                "best_of",
            )
        for name, strings in (("stop", self.stop_strings), ("bad_words", self.bad_words)):
            if len(strings) > MAX_STOP_STRINGS or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in strings):
                raise InvalidParameterError(
                    f"{name} takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters", name
                )
        if self.use_beam_search:
            self._check_beam_search()
        elif self.length_penalty != 1:
            raise InvalidParameterError("length_penalty needs use_beam_search: true", "length_penalty")

    def _check_beam_search(self) -> None:
        """Beams are ranked by the model's own distribution: what would edit it, or cut a beam short, is refused."""
        if self.n > MAX_BEAMS:
            raise InvalidParameterError(f"n must be at most {MAX_BEAMS} with use_beam_search, got {self.n}", "n")
        for name in NOT_WITH_BEAM_SEARCH:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise InvalidParameterError(f"{name} cannot be combined with use_beam_search", name)
        if not -10 <= self.length_penalty <= 10:
            raise InvalidParameterError(
                f"length_penalty must be a number in [-10, 10], got {self.length_penalty}", "length_penalty"
            )

    def sampling_params(
        self,
        max_tokens: int,
        defaults: Mapping[str, float | int],
        prompt_logprobs: int | None,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> SamplingParams:
        """The engine's part of the request; `defaults` fill what the request leaves out, `bad_words` are tokens."""

        def value(name: str, otherwise: float | int) -> Any:
            given = getattr(self, name)
            return given if given is not None else defaults.get(name, otherwise)

        params = SamplingParams(
            temperature=value("temperature", 1.0),
            top_p=value("top_p", 1.0),
            top_k=value("top_k", 0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=token_biases(self.logit_bias or {}),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
            prompt_logprobs=prompt_logprobs,
            logprob_token_ids=None if self.logprob_token_ids is None else tuple(self.logprob_token_ids),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words_token_ids=tuple(bad_words),
        )
        if params.temperature == 0 and self.n > 1 and not self.use_beam_search:
            raise InvalidParameterError(f"n must be 1 when temperature is 0 (greedy), got {self.n}", "n")
        return params

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return NOT_HONOURED

    def _check_extras(self) -> None:
        known = self._not_honoured()
        for name, value in (self.model_extra or {}).items():
            if name in known and not any(type(value) is type(allowed) and value == allowed for allowed in known[name]):
                hint = f"; {REPLACED[name]}" if name in REPLACED else ""
                raise InvalidParameterError(f"{name} is not supported by this server; leave it out{hint}", name)
        note_unknown("", self, known)
