"""`nvfp4 serve`: the flags about who may ask for what, and what is made of them."""

from __future__ import annotations

import argparse
import ipaddress
from typing import Any

from nvfp4_runtime.errors import ConfigError
from server.commands import flags
from server.config import read_api_keys


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--api-key-file", type=flags.path, metavar="FILE", help="keys that clients need, one per line")
    add(
        "--allow-unauthenticated",
        action="store_true",
        help="listen on an address that others reach without asking for a key",
    )
    add(
        "--metrics-port",
        type=flags.whole,
        metavar="PORT",
        help="answer /metrics there without a key, and nothing else (0 takes any free port)",
    )
    add("--share-prefix-cache", action="store_true", help="between API keys, which can then time each other's prompts")


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Of ServerConfig. Raises ConfigError for an open address without keys."""
    if args.api_key_file is None and not args.allow_unauthenticated and not is_loopback(args.host):
        raise ConfigError(
            f"everybody who reaches {args.host} could use this server: give --api-key-file, or say that this is meant "
            "with --allow-unauthenticated",
            "--api-key-file",
        )
    return {
        "api_key_hashes": () if args.api_key_file is None else read_api_keys(args.api_key_file),
        "share_prefix_cache": args.share_prefix_cache,
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
