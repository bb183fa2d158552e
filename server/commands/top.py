"""`nvfp4 top [URL]`: watch a running server in the terminal."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from nvfp4_runtime.errors import ConfigError
from server.commands import flags

DEFAULT_URL = "http://127.0.0.1:8000"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("top", help="watch a running server in the terminal")
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, metavar="URL", help="default: %(default)s")
    parser.add_argument("--api-key-file", type=flags.path, metavar="FILE", help="its first line is the server's key")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between scrapes (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for flags that cannot be and without Textual."""
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"expected a URL such as {DEFAULT_URL}, found {args.url[:200]!r}")
    if not 0.1 <= args.interval < math.inf:
        raise ConfigError(f"expected seconds, 0.1 or more, found {args.interval}", "--interval")
    key = None if args.api_key_file is None else _read_key(args.api_key_file)
    try:
        import textual.app  # noqa: F401 - to tell its absence, or that of what it needs, from a fault of ours
    except ImportError as error:
        raise ConfigError(f"nvfp4 top needs Textual ({error}): pip install 'nvfp4-runtime[top]'") from error
    from server.top.app import Top
    from server.top.scrape import Server

    server = Server(args.url, key)
    server.precision()  # a wrong address or key is said here, on a plain line
    app = Top(server, args.interval)
    app.run()
    return app.return_code or 0


def _read_key(path: str) -> str:
    try:
        key = Path(path).read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API key file {path} cannot be read: {error}", "--api-key-file") from error
    if not key:
        raise ConfigError(f"the API key file {path} has no key in its first line", "--api-key-file")
    return key
