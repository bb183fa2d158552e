"""The text of an evaluation as fixed windows of tokens, and the protocol in words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.text.tokenizer import Tokenizer

DEFAULT_WINDOWS = 16


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows from the beginning of a text, all of `size` tokens.

    num_tokens  of the whole text, of which the windows are a part
    sha256      of the text's bytes
    """

    ids: tuple[tuple[int, ...], ...]
    size: int
    num_tokens: int
    source: str
    sha256: str

    @property
    def num_scored(self) -> int:
        return len(self.ids) * (self.size - 1)

    @property
    def protocol(self) -> str:
        """How the figures are computed, for whoever wants to compare theirs."""
        return (
            f"The text is tokenised once as a whole, no special tokens added: {self.num_tokens:,} tokens. Scored are "
            f"the first {len(self.ids)} non-overlapping windows of {self.size}, each on its own; its first token is "
            f"context only, the other {self.size - 1} are predicted from all before them in the window. "
            "Negative log-likelihood (NLL) in nats, perplexity = exp(mean NLL)."
        )


def read_text(path: str | Path) -> str:
    """The UTF-8 text in a file; ConfigError names what is wrong with it."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"the text {path} cannot be read: {error.strerror or error}", "--text") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the text {path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it first "
            "(iconv -t UTF-8)",
            "--text",
        ) from error
    if not text.strip():
        raise ConfigError(f"the text {path} is empty; expected some prose to predict", "--text")
    return text


def cut(
    tokenizer: Tokenizer, text: str, size: int, count: int | None = None, source: str = "the given text"
) -> Windows:
    """The first `count` windows of `size` tokens of `text`; None: 16, or as many whole ones as there are.

    Raises ConfigError for a size below 2 and for a text that has too few tokens.
    """
    if size < 2:
        raise ConfigError(f"a window of {size} tokens scores nothing; expected at least 2", "--window")
    if count is not None and count < 1:
        raise ConfigError(f"{count} windows score nothing; expected at least 1", "--windows")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = len(tokens) // size
    if not whole:
        raise ConfigError(
            f"{source} has {len(tokens)} token{'s' * (len(tokens) != 1)}, too few for one window of {size}; give a "
            "longer text, or smaller windows with --window",
            "--text",
        )
    if count is not None and count > whole:
        raise ConfigError(
            f"{source} has {len(tokens)} tokens, enough for {whole} windows of {size}, and {count} were asked for",
            "--windows",
        )
    count = min(DEFAULT_WINDOWS, whole) if count is None else count
    ids = tuple(tuple(tokens[i * size : (i + 1) * size]) for i in range(count))
    return Windows(ids, size, len(tokens), source, hashlib.sha256(text.encode()).hexdigest())
