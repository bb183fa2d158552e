"""TextProcessor: what the server needs of a checkpoint's text side, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.simulated import byte_tokenizer, chatml_template
from nvfp4_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextProcessor:
    """Tokenizer and chat template of one model; `chat_template` is None where the checkpoint has none."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None

    @classmethod
    def load(cls, folder: str | Path) -> TextProcessor:
        tokenizer = Tokenizer.load(folder)
        return cls(tokenizer, ChatTemplate.load(folder, tokenizer.special_tokens))

    @classmethod
    def simulated(cls) -> TextProcessor:
        tokenizer = byte_tokenizer()
        return cls(tokenizer, chatml_template(tokenizer))
