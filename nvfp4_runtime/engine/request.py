"""A request inside the engine. Torch-free."""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import TYPE_CHECKING

from nvfp4_runtime.engine.messages import RequestTimes, Submit
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.state import SamplingState
from nvfp4_runtime.structured.matcher import GrammarState

if TYPE_CHECKING:  # the server imports this module, and has no use for numpy
    import numpy as np
    import numpy.typing as npt

    FloatRow = npt.NDArray[np.float32]


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Request:
    """One sequence: its tokens, how far they are computed, and the blocks that hold their KV.

    tokens               prompt and output together, as far as they are known
    num_pending          tokens that scheduled steps will sample and nobody has read yet; they count in `num_tokens`
    num_computed         tokens whose KV is in `block_ids` once every scheduled step has run
    state_slot           of the model's states while it runs, where the model has any; 0: none
    block_hashes         chained hashes of the full blocks of `tokens`, as far as they were needed
    num_published        how many blocks this request has made findable
    num_cached_tokens    prompt tokens whose KV was found, at first admission; -1 before it
    num_scored           prompt positions whose logprobs were sent (prompt_logprobs only)
    arrival              position in the order of arrival, given by the scheduler
    hidden_sum           pooling only: the sum of the hidden states that are pooled, as far as they are computed
    num_faults           how often the scheduler raised while it handled this request
    num_memory_faults    how often it was preempted because a step ran out of memory
    is_degenerate        its answer was seen to go round in circles
    epoch                how often its blocks were given back: a step scheduled before that is not its any more
    """

    def __init__(
        self,
        submit: Submit,
        seed: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        grammar: GrammarState | None = None,
    ) -> None:
        self.id = submit.request_id
        self.params: SamplingParams = submit.params
        self.tokens = list(submit.prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.output_token_ids: list[int] = []
        self.eos_token_ids = eos_token_ids
        room = max_model_len - self.num_prompt_tokens
        self.max_output_tokens = room if self.params.max_tokens is None else min(self.params.max_tokens, room)
        self.sampling = SamplingState(
            params=self.params,
            seed=seed,
            prompt_token_ids=self.tokens[: self.num_prompt_tokens],
            output_token_ids=self.output_token_ids,
            eos_token_ids=eos_token_ids,
            grammar=grammar,
        )
        self.status = Status.WAITING
        self.cache_salt = submit.cache_salt
        self.adapter = submit.adapter
        self.priority = submit.priority
        self.pooling = submit.pooling
        self.tenant = submit.tenant
        self.hidden_sum: FloatRow | None = None
        self.arrival = 0
        self.num_pending = 0
        self.num_computed = 0
        self.num_faults = 0
        self.num_memory_faults = 0
        self.is_degenerate = False
        self.epoch = 0
        self.block_ids: list[int] = []
        self.state_slot = 0
        self.block_hashes: list[bytes] = []
        self.num_published = 0
        self.num_cached_tokens = -1
        self.num_scored = 0
        self.times = RequestTimes(submit.arrival_seconds, 0.0, 0.0, 0.0)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: by priority, then by arrival."""
        return self.priority, self.arrival

    def pool(self, part: FloatRow, start: int) -> None:
        """Take the hidden states of the tokens from `start` on (a preempted request begins again at 0)."""
        adds = self.pooling == "mean" and start > 0
        self.hidden_sum = self.hidden_sum + part if adds and self.hidden_sum is not None else part

    @property
    def embedding(self) -> bytes | None:
        """What was pooled, at unit length; None before anything was."""
        if self.hidden_sum is None:
            return None
        # A sum and a mean differ in length only, and that is taken out.
        length = math.sqrt(float(self.hidden_sum @ self.hidden_sum))
        return (self.hidden_sum / (length or 1.0)).astype("float32").tobytes()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def ends_with_pending(self) -> bool:
        """The token on its way is the last there is room for: nothing is left to compute."""
        return self.num_pending > 0 and len(self.output_token_ids) + self.num_pending >= self.max_output_tokens

    def start_over(self) -> None:
        """Nothing is computed, nothing is held: only the tokens count."""
        self.tokens[self.num_prompt_tokens :] = self.output_token_ids
        self.status = Status.WAITING
        self.block_ids, self.block_hashes = [], []
        self.state_slot = 0
        self.num_computed = self.num_published = self.num_pending = 0
        self.epoch += 1

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.output_token_ids.append(token_id)

    def finish_reason(self) -> tuple[str, int | None] | None:
        """Why the newest token ends the request, as (finish_reason, stop_reason), or None."""
        token_id, params, count = self.output_token_ids[-1], self.params, len(self.output_token_ids)
        if count >= params.min_tokens:
            if not params.ignore_eos and token_id in self.eos_token_ids:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        if self.sampling.grammar is not None and self.sampling.grammar.complete:
            return "stop", None
        if count >= self.max_output_tokens:
            return "length", None
        return None

    @property
    def ends_whole(self) -> bool:
        """The grammar is complete with the newest token, which is text and not what stopped it."""
        grammar, token_id = self.sampling.grammar, self.output_token_ids[-1]
        stops = token_id in self.eos_token_ids or token_id in self.params.stop_token_ids
        return grammar is not None and grammar.complete and not stops
