"""The flags of `nvfp4 serve` as configurations: what the HTTP side is told, and what the engine is told."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace

from nvfp4_runtime.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SimulatedConfig,
)
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.text.processor import TextProcessor
from server.commands import limits, security
from server.commands.parallel import kv_events
from server.commands.reliability import simulated_faults
from server.config import ServerConfig
from server.reasoning.parsers import reasoning_style
from server.tools.parsers import tool_style

logger = logging.getLogger(__name__)


def server_config(args: argparse.Namespace, model: str | None) -> ServerConfig:
    names = args.served_model_name or ["simulated"]
    if not all(name.strip() for name in names):
        raise ConfigError("an empty name is no request's; give one, or leave the flag out", "--served-model-name")
    if not args.simulate:
        for flag, given in (("step-seconds", args.simulate_step_seconds), ("script", args.simulate_script)):
            if given is not None:
                raise ConfigError(f"--simulate-{flag} says how to simulate; it needs --simulate", f"--simulate-{flag}")
    elif not 0 <= (args.simulate_step_seconds or 0.0) < math.inf:
        raise ConfigError(f"expected seconds, 0 or more, found {args.simulate_step_seconds}", "--simulate-step-seconds")
    tool_style(args.tool_call_parser, None, True)  # a name that is not known ends the start here, not after loading
    reasoning_style(args.reasoning_parser, None)
    secured = security.config_fields(args)
    if not secured["api_key_hashes"] and not security.is_loopback(args.host):
        logger.warning("listening on %s without --api-key-file: everybody who reaches it may use it", args.host)
    if not 0 < args.response_store_ttl < math.inf:
        raise ConfigError(f"expected seconds, more than 0, found {args.response_store_ttl}", "--response-store-ttl")
    return ServerConfig(
        served_model_names=tuple(names),
        model_root=model or "",
        shutdown_timeout_seconds=args.shutdown_timeout,
        drain_delay_seconds=args.drain_delay,
        stall_seconds=args.stall_timeout,
        enable_prompt_tokens_details=args.enable_prompt_tokens_details,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        trust_request_chat_template=args.trust_request_chat_template,
        enable_tokenizer_info=args.enable_tokenizer_info_endpoint,
        pooling=args.embedding_pooling,
        stored_responses_bytes=args.response_store_memory,
        stored_responses_seconds=args.response_store_ttl,
        **secured,
        **limits.config_fields(args),
        log_requests=not args.no_log_requests,
        log_prompts=args.log_prompts,
        ui=not args.no_ui,
    )


def whole_engine_config(
    args: argparse.Namespace, model: str, place: ParallelConfig, config: ServerConfig
) -> EngineConfig:
    """Of a server, with what one rank's alone lacks. ConfigError for an adapter that has the model's name."""
    engine = replace(engine_config(args, model), parallel=place, kv_events=kv_events(args.kv_events_config))
    for adapter in engine.adapters:
        if adapter.name in config.served_model_names:
            raise _no_adapter(adapter.name, "the model has that name; choose another, or another --served-model-name")
    return engine


def engine_config(args: argparse.Namespace, model: str) -> EngineConfig:
    simulated = None
    if args.simulate:
        tokenizer = TextProcessor.simulated().tokenizer
        simulated = SimulatedConfig(
            vocab_size=tokenizer.vocab_size,
            max_model_len=SimulatedConfig.max_model_len if args.max_model_len is None else args.max_model_len,
            script=tuple(tokenizer.encode_plain(args.simulate_script or "")),
            eos_token_id=tokenizer.eos_token_ids[0],
            step_seconds=args.simulate_step_seconds or 0.0,
            faults=simulated_faults(args.simulate_fault, tokenizer.encode_plain),
        )
    return EngineConfig(
        model=model,
        dtype=args.dtype,
        numerics=args.numerics,
        lm_head_dtype=args.lm_head_dtype,
        model_impl=args.model_impl,
        adapters=adapter_flags(args.lora_modules or []),
        max_lora_rank=args.max_lora_rank,
        device=args.device,
        backend=args.backend,
        cuda_graphs=not args.no_cuda_graphs,
        self_test=not args.no_self_test,
        machine_limits=args.machine_limits,
        log_format=args.log_format,
        threads=args.threads,
        seed=args.seed,
        cache=CacheConfig(
            num_blocks=args.num_kv_blocks,
            memory_bytes=args.kv_cache_memory,
            kv_dtype=args.kv_cache_dtype,
            enable_prefix_caching=not args.no_prefix_caching,
            gpu_memory_utilization=args.gpu_memory_utilization,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
            max_queued_requests=args.max_queued_requests,
            max_queued_tokens=args.max_queued_tokens,
        ),
        simulated=simulated,
    )


def adapter_flags(values: Sequence[str]) -> tuple[AdapterConfig, ...]:
    """`name=path`, or vLLM's JSON object with name and path, as often as given. ConfigError for what is neither."""
    found: list[AdapterConfig] = []
    for value in values:
        name, _, path = value.partition("=")
        if value.lstrip().startswith("{"):
            try:
                given = json.loads(value)
            except ValueError as error:
                raise _no_adapter(value, f"it is no JSON: {error}") from error
            unknown = given.keys() - {"name", "path", "base_model_name"}
            if unknown:
                raise _no_adapter(value, f"unknown {', '.join(sorted(unknown))}")
            name, path = given.get("name", ""), given.get("path", "")
        if not all(isinstance(part, str) and part.strip() for part in (name, path)):
            raise _no_adapter(value, "expected name=path")
        if any(name == other.name for other in found):
            raise _no_adapter(value, f"the name {name!r} is given twice")
        found.append(AdapterConfig(name, os.path.expanduser(path)))
    return tuple(found)


def _no_adapter(value: str, why: str) -> ConfigError:
    return ConfigError(f"{value[:200]!r} names no LoRA adapter: {why}", "--lora-modules")
