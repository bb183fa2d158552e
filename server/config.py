"""ServerConfig: what the HTTP side is told, resolved once. The only reader of os.environ."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nvfp4_runtime.engine.messages import Pooling
from nvfp4_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "NVFP4_"


@dataclass(frozen=True)
class ServerConfig:
    """Names, bounds and secrets of one server.

    served_model_names        the first is written into answers; requests may use any
    model_root                what /v1/models calls the root: the folder or name the model was loaded from
    api_key_hashes            SHA-256 of each accepted key; none: no key is asked for
    max_choices               prompts x n of one request
    max_body_bytes            of a request's body; more is a 413
    max_header_bytes          of a request's line and headers; more is a 431
    header_seconds            for a request's line and headers to arrive
    body_seconds              for its body; longer is a 408
    request_timeout_seconds   from admission to the last token; a request's `timeout` may be less, not more
    stream_buffer_bytes       of a streamed answer that wait for a client which lags; more ends it
    metrics_port              where /metrics answers without a key, and nothing else answers; None: nowhere
    share_prefix_cache        API keys share one prefix cache
    shutdown_timeout_seconds  how long running requests may go on after SIGTERM
    drain_delay_seconds       how long new ones are still accepted after SIGTERM, until load balancers know
    stall_seconds             work waits and the engine makes no progress for so long: not ready; twice: not live
    slow_client_seconds       a stream whose client takes nothing for this long is aborted
    tool_call_parser          by name, "auto" (by the chat template) or "none"
    reasoning_parser          the same
    trust_request_chat_template  requests may bring a chat_template of their own; it runs in a process that can be ended
    enable_tokenizer_info     /tokenizer_info answers
    pooling                   how /v1/embeddings makes one vector of a prompt, where the request does not say
    stored_responses_bytes    bound on what /v1/responses keeps; the oldest go first
    stored_responses_seconds  how long it keeps one
    log_requests, log_prompts one line in the log per request; the beginning of its prompt in it
    ui                        the page at / is served
    default_sampling          the checkpoint's own sampling defaults, for parameters a request leaves out
    """

    served_model_names: tuple[str, ...] = ("default",)
    model_root: str = ""
    api_key_hashes: tuple[bytes, ...] = ()
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    request_timeout_seconds: float = 600.0
    stream_buffer_bytes: int = 256 << 10
    metrics_port: int | None = None
    share_prefix_cache: bool = False
    max_n: int = 128
    max_choices: int = 1024
    shutdown_timeout_seconds: float = 30.0
    drain_delay_seconds: float = 5.0
    stall_seconds: float = 30.0
    slow_client_seconds: float = 30.0
    enable_prompt_tokens_details: bool = False
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    trust_request_chat_template: bool = False
    enable_tokenizer_info: bool = False
    pooling: Pooling = "last"
    stored_responses_bytes: int = 64 << 20
    stored_responses_seconds: float = 3600.0
    log_requests: bool = True
    log_prompts: bool = False
    ui: bool = True
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)


def hash_key(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def read_api_keys(path: str | Path) -> tuple[bytes, ...]:
    """Hashes of the keys in a file, one key per line. ConfigError when it cannot be read or holds none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API key file {path} cannot be read: {error}", "--api-key-file") from error
    keys = tuple(hash_key(line.strip()) for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"the API key file {path} holds no key; expected one per line", "--api-key-file")
    return keys


def traces_wanted() -> bool:
    """Whether OpenTelemetry's own variables ask for traces: an endpoint is given, and the SDK is not disabled."""
    named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and any(os.environ.get(name) for name in named)


# How torchrun and LeaderWorkerSet tell a process which one it is.
_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE",
    "LWS_WORKER_INDEX", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


def launcher_variables() -> dict[str, str]:
    """What whoever started this process says of its place among others, where it says anything."""
    return {name: os.environ[name] for name in _LAUNCHERS if os.environ.get(name)}


# Ours beside the flags: they choose native code, at run time and at build time.
NOT_FLAGS = ("NVFP4_ISA", "NVFP4_SANITIZE")


def warn_of_unknown(names: Iterable[str]) -> None:
    """Say which NVFP4_ variables of the environment set nothing, and what may have been meant."""
    known = [ENVIRONMENT_PREFIX + name.upper() for name in names]
    for variable in os.environ:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in (*known, *NOT_FLAGS):
            close = difflib.get_close_matches(variable, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            logger.warning("the environment variable %s sets no flag of serve%s", variable, hint)


def environment_flags(names: Iterable[str]) -> dict[str, str]:
    """Values of flags set by environment: `max_num_seqs` by NVFP4_MAX_NUM_SEQS. An empty value counts as unset."""
    found = {}
    for name in names:
        if value := os.environ.get(ENVIRONMENT_PREFIX + name.upper()):
            found[name] = value
    return found
