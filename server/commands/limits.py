"""`nvfp4 serve`: the flags about admission and limits, and what is made of them."""

from __future__ import annotations

import argparse
import math
from typing import Any

from nvfp4_runtime.config import SchedulerConfig
from nvfp4_runtime.errors import ConfigError
from server.commands import flags
from server.config import ServerConfig

# flag -> the field of ServerConfig, and what it is for
_SECONDS = {
    "--request-timeout": (
        "request_timeout_seconds",
        "from admission to the last token; then 504, or an error event in a stream. A request may ask for less",
    ),
    "--header-timeout": ("header_seconds", "for a request's line and headers to arrive; then 408"),
    "--body-timeout": ("body_seconds", "for a request's body to arrive; then 408"),
    "--slow-reader-timeout": ("slow_client_seconds", "without progress before a stream is aborted"),
}
_SIZES = {
    "--max-body-size": ("max_body_bytes", "of a request; more is refused with 413"),
    "--max-header-size": ("max_header_bytes", "of a request's line and headers; more is refused with 431"),
    "--stream-buffer": ("stream_buffer_bytes", "kept of a streamed answer whose client lags; then it is aborted"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    bounds = SchedulerConfig()
    add(
        "--max-queued-requests",
        type=flags.whole,
        default=bounds.max_queued_requests,
        help="beside those of one step; more are refused with 429 (default: %(default)s)",
    )
    add(
        "--max-queued-tokens",
        type=flags.whole,
        default=bounds.max_queued_tokens,
        help="prompt tokens of requests that wait; more are refused with 429 (default: %(default)s)",
    )
    for flag, (field, text) in _SECONDS.items():
        default = getattr(ServerConfig, field)
        add(flag, type=float, default=default, metavar="SECONDS", help=f"{text} (default: {default:g})")
    for flag, (field, text) in _SIZES.items():
        default = getattr(ServerConfig, field)
        add(flag, type=flags.size, default=default, metavar="SIZE", help=f"{text} (default: {default >> 10}KiB)")


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Of ServerConfig. Raises ConfigError for a time that is none."""
    found = {}
    for flag, (field, _) in (_SECONDS | _SIZES).items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if flag in _SECONDS and not 0 < value < math.inf:
            raise ConfigError(f"expected seconds, more than 0, found {value}", flag)
        found[field] = value
    return found
