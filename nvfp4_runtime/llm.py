"""LLM: the offline door. The same engine as the server's, in this process, with text on both ends."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine, check_request
from nvfp4_runtime.engine.messages import EngineInfo, Submit, TokenLogprob, TokenOutput
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass
class Generation:
    """What one prompt became.

    finish_reason    "stop", "length", or "error" with the reason in `error`
    text             output tokens decoded, special tokens left out
    logprobs         one entry per output token, if params.logprobs was set
    prompt_logprobs  one entry per prompt token, None for the first, if params.prompt_logprobs was set
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    def take(self, output: TokenOutput) -> None:
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or [])
        self.prompt_logprobs.extend(output.prompt_logprobs or [])
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.num_cached_tokens = output.num_cached_tokens
        self.error = output.error


class LLM:
    """Generate from a local checkpoint folder.

    >>> LLM("path/to/checkpoint").generate(["The capital of France is"], SamplingParams(temperature=0.0))[0].text

    Keyword arguments are EngineConfig's (`numerics`, `dtype`, `lm_head_dtype`, `device`, `backend`, `threads`, `seed`,
    `adapters`), CacheConfig's and SchedulerConfig's. Raises ConfigError, CheckpointError, KernelError while loading.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        cache = {k: options.pop(k) for k in list(options) if k in CacheConfig.__dataclass_fields__}
        scheduler = {k: options.pop(k) for k in list(options) if k in SchedulerConfig.__dataclass_fields__}
        config = EngineConfig(
            model=str(model), cache=CacheConfig(**cache), scheduler=SchedulerConfig(**scheduler), **options
        )
        self.tokenizer = Tokenizer.load(Path(model))
        self.engine: Engine = build_engine(config)
        self._ids = itertools.count()

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str] = "",
    ) -> list[Generation]:
        """Complete every prompt (text, or token ids), batched continuously; results in the order of `prompts`.

        `params` is one for all, or one per prompt; so is `adapter`, the name of a loaded LoRA adapter ("": none).
        Raises RequestError for a prompt that can never be served, before anything runs.
        """
        batch = _as_batch(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts need as many params, got {len(each)}")
        names = [adapter] * len(batch) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(batch):
            raise ValueError(f"{len(batch)} prompts need as many adapters, got {len(names)}")
        waiting: deque[Submit] = deque()
        results: dict[str, Generation] = {}
        for prompt, one, name in zip(batch, each, names, strict=True):
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            check_request(tokens, one, self.info, name)
            if one.structured is not None and self.engine.grammars is not None:
                self.engine.grammars.compile(one.structured)
            request_id = f"llm-{next(self._ids)}"
            waiting.append(Submit(request_id, tokens, one, time.monotonic(), adapter=name))
            results[request_id] = Generation(tokens)
        try:
            while waiting or self.engine.has_work:
                while waiting and self.engine.has_room:
                    self.engine.add(waiting.popleft())
                for output in self.engine.step()[0]:
                    results[output.request_id].take(output)
        finally:  # interrupted: leave nothing behind that the next call would meet
            for request_id in results:
                self.engine.abort(request_id)
        for result in results.values():
            result.text = self.tokenizer.decode(result.token_ids)
        return list(results.values())


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # a sequence of ints is one prompt
    return list(prompts)  # type: ignore[arg-type]  # neither text nor ids: many of them
