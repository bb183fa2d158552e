"""A tokenizer and chat template made in code, for the simulated engine: one token per byte, no files."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.tokenizer import BYTE_LEVEL_ALPHABET, Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes, 256..258 the special tokens of ChatML; <|im_end|> ends a generation."""
    vocab = dict(BYTE_LEVEL_ALPHABET)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return Tokenizer(raw, {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[2]})


def chatml_template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(CHATML, tokenizer.special_tokens)
