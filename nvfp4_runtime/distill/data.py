"""Training text as rows of token ids: documents from files or datasets, joined, cut to one length, dealt by a seed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.errors import ConfigError, InvalidParameterError
from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.tokenizer import Tokenizer

FLAG = "--data"


@dataclass(frozen=True)
class Rows:
    """Token ids int32 [R, T], every position valid; `sha256` is of the ids."""

    ids: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def batch(self, indices: list[int], device: torch.device) -> Tensor:
        """int64 [B, T]."""
        return torch.from_numpy(self.ids[indices].astype(np.int64)).to(device)

    def first(self, count: int) -> Rows:
        return Rows(self.ids[:count])

    def split(self, held: int) -> tuple[Rows, Rows]:
        """(the rest, `held` rows evenly spaced over the text)."""
        chosen = np.linspace(0, len(self) - 1, held).astype(int)
        kept = np.ones(len(self), dtype=bool)
        kept[chosen] = False
        return Rows(self.ids[kept]), Rows(self.ids[chosen])


def load_rows(source: str, folder: Path, length: int, flag: str = FLAG) -> Rows:
    """Rows of `length` tokens of `source`, tokenised and templated as `folder` says.

    source  a .jsonl file of {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...} objects; any other
            file: plain text, one document; "hf:NAME[:SPLIT[:COLUMN]]": a dataset, through the package `datasets`

    Documents are joined, each ended by the tokenizer's end of sequence. Raises ConfigError naming file and line.
    """
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder)
    ids = array("i")  # four bytes a token
    for where, document in _documents(source, flag):
        try:
            ids.extend(_encode(document, where, tokenizer, template, flag))
        except (InvalidParameterError, UnicodeError, TypeError) as error:  # as a template or the tokenizer refuses
            raise ConfigError(f"{where} cannot be tokenised: {error}", flag) from error
        ids.extend(tokenizer.eos_token_ids[:1])
    return to_rows(ids, length, source, flag)


def to_rows(ids: Sequence[int], length: int, source: str, flag: str = FLAG) -> Rows:
    count = len(ids) // length
    if count < 2:
        raise ConfigError(
            f"{source} has {len(ids)} tokens, too few for two rows of {length}; give more text or shorter rows (--seq)",
            flag,
        )
    return Rows(np.asarray(ids[: count * length], dtype=np.int32).reshape(count, length))


def _documents(source: str, flag: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, text or an object) of each document."""
    if source.startswith("hf:"):
        yield from _dataset(source, flag)
        return
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text {source} cannot be read: {error}", flag) from error
    if path.suffix == ".json":
        raise ConfigError(f"{source}: expected plain text, or .jsonl with one object a line; rewrite it as that", flag)
    if path.suffix != ".jsonl":
        yield source, text
        return
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                yield f"{source}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # as long numbers and deep nesting do
                raise ConfigError(f"{source}:{number} is not JSON: {error}", flag) from error


def lines(text: str) -> list[str]:
    """Of a .jsonl file or one of prompts. Not str.splitlines(): a JSON string may hold U+2028, U+0085 and the like."""
    return text.removesuffix("\n").split("\n")


def _dataset(source: str, flag: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package datasets: pip install 'nvfp4-runtime[train]', or give a .jsonl file", flag
        ) from error
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the package, its readers and the network raise what they like
        raise ConfigError(f"the dataset {name} cannot be loaded: {type(error).__name__}: {error}", flag) from error
    for number, record in enumerate(found):
        if column and column not in record:
            raise ConfigError(f"{source} has no column {column!r}; it has {', '.join(sorted(record))}", flag)
        yield f"{source}[{number}]", record[column] if column else record


def _encode(document: Any, where: str, tokenizer: Tokenizer, template: ChatTemplate | None, flag: str) -> list[int]:
    if isinstance(document, str):
        return tokenizer.encode(document, add_special_tokens=False)
    if isinstance(document, dict):
        if isinstance(document.get("text"), str):
            return tokenizer.encode(document["text"], add_special_tokens=False)
        if isinstance(document.get("prompt"), str) and isinstance(document.get("completion"), str):
            return tokenizer.encode(document["prompt"] + document["completion"], add_special_tokens=False)
        if is_chat(document.get("messages")):
            if template is None:
                raise ConfigError(f"{where} has messages, and the teacher has no chat template for them", flag)
            rendered = template.render(document["messages"], add_generation_prompt=False)
            return tokenizer.encode(rendered, add_special_tokens=False)
    raise ConfigError(
        f'{where}: expected {{"text": ...}}, {{"messages": [{{"role": ..., "content": ...}}, ...]}} or '
        '{"prompt": ..., "completion": ...}',
        flag,
    )


def is_chat(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    """At least one message, each with a role and a content, as chat templates take them."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), (str, list))
            for m in messages
        )
    )


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of one pass over the rows: the same for the same seed, whatever is trained."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [int(i) for i in torch.randperm(rows, generator=generator)]


def indices(start: int, count: int, rows: int, seed: int) -> list[int]:
    """Rows number `start` to `start + count` of the endless stream."""
    orders = {epoch: order(rows, seed, epoch) for epoch in {start // rows, (start + count - 1) // rows}}
    found = list[int]()
    for position in range(start, start + count):
        epoch = position // rows
        if epoch not in orders:
            orders[epoch] = order(rows, seed, epoch)
        found.append(orders[epoch][position % rows])
    return found
