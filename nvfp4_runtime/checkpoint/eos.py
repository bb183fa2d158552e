"""The tokens that end a generation, from wherever a checkpoint declares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvfp4_runtime.checkpoint.shards import load_json


def eos_token_ids(folder: Path, of_config: Sequence[int]) -> list[int]:
    """Ids of config.json (`of_config`), of generation_config.json, and of the tokenizer's eos_token, each once.

    They differ in practice: a chat model's config.json may hold the base model's end of text, its tokenizer the end
    of a turn.
    """
    declared = _json(folder / "generation_config.json").get("eos_token_id")
    more = declared if isinstance(declared, list) else [] if declared is None else [declared]
    tokenizer = _json(folder / "tokenizer_config.json")
    token = tokenizer.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    found = [_id_of(text, tokenizer, folder)] if isinstance(text, str) else []
    return list(dict.fromkeys(i for i in [*of_config, *more, *found] if type(i) is int))


def _id_of(text: str, tokenizer: dict[str, Any], folder: Path) -> int | None:
    decoder = tokenizer.get("added_tokens_decoder")
    for token_id, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == text and token_id.isdecimal() and len(token_id) < 10:
            return int(token_id)
    added = _json(folder / "tokenizer.json").get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("content") == text and type(entry.get("id")) is int:
            return int(entry["id"])
    return None


def _json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}
