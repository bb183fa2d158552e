"""Small tokenizers made in code, one for each way of writing text as tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nvfp4_runtime.text.simulated import byte_tokenizer
from nvfp4_runtime.text.tokenizer import Tokenizer

WORDS = ["Hello", "world", "日", "本", "a", "b", "!", "é", ",", ""]  # the last one: a blank alone


def make_sentencepiece() -> Tokenizer:
    """Like Llama 2's: spaces as U+2581, unknown characters as byte tokens, a leading space stripped in decoding."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in WORDS:
        for piece in (word, "▁" + word):
            if piece:
                vocab.setdefault(piece, len(vocab))
    scores = [(piece, 0.0 if piece.startswith("<0x") else -1.0) for piece in vocab]
    raw = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    return Tokenizer(raw, {"bos_token": "<s>", "eos_token": "</s>"})


def make_strip_special() -> Tokenizer:
    """A byte-level one whose special tokens swallow the blanks beside them (Phi-3), and a special within a special."""
    raw = tokenizers.Tokenizer.from_str(byte_tokenizer()._raw.to_str())
    raw.add_special_tokens(
        [
            AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
            AddedToken("<|mask|>", special=True, normalized=False, lstrip=True),
            AddedToken("<s>", special=True, normalized=False),
            AddedToken("<<s>", special=True, normalized=False),
        ]
    )
    raw.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer(raw, {"eos_token": "<|end|>"})


def make_wordlevel() -> Tokenizer:
    raw = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    return Tokenizer(raw)


@pytest.fixture(scope="session")
def smollm(shared: Path) -> Path:
    """The tokenizer folder of the default model."""
    return shared / "models" / "SmolLM2-135M-Instruct"
