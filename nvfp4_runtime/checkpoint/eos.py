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
    return list(dict.fromkeys(i for i in [*of_config, *more, *found] if isinstance(i, int)))


def _id_of(text: str, tokenizer: dict[str, Any], folder: Path) -> int | None:
    for token_id, entry in tokenizer.get("added_tokens_decoder", {}).items():
        if entry.get("content") == text:
            return int(token_id)
    for entry in _json(folder / "tokenizer.json").get("added_tokens", []):
        if entry.get("content") == text:
            return int(entry["id"])
    return None


def _json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}
