"""Text to token ids and back, from a checkpoint's tokenizer.json. Imports neither transformers nor torch."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError

# From here on encoding takes milliseconds: servers do it off their event loop.
LONG_TEXT_CHARS = 8192

_SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character GPT-2's byte-level BPE writes for each byte, inverted.

    Printable Latin-1 bytes stand for themselves; the other 68 get the characters from U+0100 on, in byte order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special-token rules a server needs.

    Strings from a template or a completion prompt may name special tokens; strings from chat users may not:
    `encode_rendered` tells them apart. Thread-safe: nothing is changed after construction but memo tables.

    special_tokens     role -> text, such as {"bos_token": "<s>"}; what chat templates see
    special_ids        ids that `skip_special_tokens` drops
    eos_token_ids      every id that ends a generation, from the tokenizer's and the model's configuration
    is_byte_level      token -> bytes is a table, so decoding can be exact and incremental
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        add_bos: bool | None = None,
    ) -> None:
        raw.no_padding()
        raw.no_truncation()
        self._raw = raw
        # A second instance, because this switch is a property of the whole object and we encode in threads.
        self._plain = _without_special_tokens(raw)
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = raw.get_vocab_size(with_added_tokens=True)
        added = raw.get_added_tokens_decoder()
        self._special = {token.content: (token_id, token) for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(token_id for token_id, _ in self._special.values())
        self.bos_token_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([eos] if eos is not None else [])]))
        self._add_bos = add_bos
        decoder_types = _decoder_types(raw)
        self.is_byte_level = decoder_types == ["ByteLevel"]
        self._added = frozenset(added)
        spelled = {raw.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self._byte_tokens = spelled if "ByteFallback" in decoder_types else {}
        self._bytes: dict[int, bytes] = {}
        self._whole_texts: dict[int, str | None] = {}
        texts = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._prefixes = frozenset(text[:end] for text in texts for end in range(1, len(text)))
        self._longest_prefix = max(map(len, self._prefixes), default=0)
        # Digits only: survives upper/lower filters and JSON escaping in templates. 105 bits nobody can guess.
        self.guard = "".join(secrets.choice("0123456789") for _ in range(32))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the configuration files beside it.

        Raises UnsupportedFormatError when there is no readable tokenizer.json.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedFormatError(
                f"{folder} has no tokenizer.json; expected the fast tokenizer's file. Convert it once with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            raw: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UnsupportedFormatError(f"{path} is not a readable tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        special = special_tokens_of(read_json(folder / "special_tokens_map.json")) | special_tokens_of(config)
        eos: list[int] = []
        for name in ("generation_config.json", "config.json"):
            eos += _token_ids(read_json(folder / name).get("eos_token_id"), folder / name)
        add_bos = config.get("add_bos_token")
        return cls(raw, special, eos_token_ids=eos, add_bos=add_bos if isinstance(add_bos, bool) else None)

    # -- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it become their ids (as in vLLM's completions)."""
        ids: list[int] = self._encode(self._raw, text, add_special_tokens)
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and self._add_bos and ids[:1] != [bos]:
            ids.insert(0, bos)  # the template of tokenizer.json lacks it, tokenizer_config.json asks for it
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` with special tokens in it read as ordinary characters, and none added."""
        return self._encode(self._plain, text, False)

    def shield(self, value: Any) -> Any:
        """`value` with a guard string inside every special token's text, in all strings of nested lists and dicts.

        What users wrote goes through here before a template sees it; `encode_rendered` takes the guard out again.
        A tail that could become a special token together with the text after it is broken up as well.
        """
        if isinstance(value, str):
            return self._shield_text(value)
        if isinstance(value, Mapping):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.shield(item) for item in value]
        return value

    def unshield(self, text: str) -> str:
        return text.replace(self.guard, "")

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a rendered chat: special tokens come from the template only, never from shielded text.

        Without guards in `text` this is `encode`. With them, the text is cut at the template's special tokens
        and the parts between are encoded as plain text, which is how a tokenizer treats them anyway.
        """
        if self.guard not in text or self._special_pattern is None:
            return self.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        if add_special_tokens and self.bos_token_id is not None and self.bos_token_id in self.encode(""):
            ids.append(self.bos_token_id)
        position = 0
        strip_left = False
        for match in self._special_pattern.finditer(text):
            token_id, token = self._special[match.group()]
            part = text[position : match.start()]
            part = part.lstrip() if strip_left else part
            ids += self.encode_plain(self.unshield(part.rstrip() if token.lstrip else part))
            ids.append(token_id)
            position, strip_left = match.end(), token.rstrip
        part = text[position:]
        ids += self.encode_plain(self.unshield(part.lstrip() if strip_left else part))
        return ids

    # -- decoding ---------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if self.is_byte_level:
            skipped = self.special_ids if skip_special_tokens else frozenset()
            return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", "replace")
        text: str = self._raw.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def raw_token(self, token_id: int) -> str:
        """A token as the vocabulary spells it, such as "Ġworld"; "" for ids without one."""
        token: str | None = self._raw.id_to_token(token_id) if token_id >= 0 else None
        return token or ""

    def id_of(self, token: str) -> int | None:
        """The id of a token that the vocabulary spells so; None without one."""
        found: int | None = self._raw.token_to_id(token)
        return found

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token such as <0x0A> stands for; None for every other token."""
        return self._byte_tokens.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; b"" for ids without a token (padding of the embedding)."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._token_bytes(token_id)
        return found

    def whole_text(self, token_id: int) -> str | None:
        """A token's text if its bytes are whole characters, else None."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            pass
        try:
            text: str | None = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._whole_texts[token_id] = text
        return text

    def token_text(self, token_id: int) -> str:
        """A token alone as text, for logprobs; parts of characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of the special tokens among `texts`."""
        return frozenset(self._special[text][0] for text in texts if text in self._special)

    def _token_bytes(self, token_id: int) -> bytes:
        token: str | None = self._raw.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if not self.is_byte_level:
            byte = self.byte_of(token_id)
            return token.replace("▁", " ").encode() if byte is None else bytes([byte])
        if token_id in self._added:  # matched in text as it stands, so it is not spelled in the alphabet
            return token.encode()
        try:
            return bytes(BYTE_LEVEL_ALPHABET[char] for char in token)
        except KeyError:  # a vocabulary entry outside the alphabet: literal text
            return token.encode()

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return self.id_of(text) if text is not None else None

    def _encode(self, raw: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if len(text) < LONG_TEXT_CHARS:
                ids: list[int] = raw.encode(text, add_special_tokens=add_special_tokens).ids
            else:  # no offsets: half the time, and the interpreter lock is held for 5 ms instead of 100 ms per 2 MB
                ids = raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidParameterError("text is not valid Unicode (it holds a lone surrogate)", "prompt") from error
        return ids

    def _shield_text(self, text: str) -> str:
        if self._special_pattern is None:
            return text
        while self._special_pattern.search(text):  # again: breaking one token may uncover another
            text = self._special_pattern.sub(lambda m: m.group()[:1] + self.guard + m.group()[1:], text)
        tails = (text[-length:] for length in range(1, min(self._longest_prefix, len(text)) + 1))
        return text + self.guard if any(tail in self._prefixes for tail in tails) else text


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text of the special tokens that a tokenizer_config.json or special_tokens_map.json names."""
    found = {}
    for role in _SPECIAL_ROLES:
        value = config.get(role)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[role] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} where there is no such file. UnsupportedFormatError when it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnsupportedFormatError(f"{path} is not readable JSON: {error}") from error
    except RecursionError as error:
        raise UnsupportedFormatError(f"{path} nests deeper than any real one; fetch the file again") from error
    if not isinstance(value, dict):
        raise UnsupportedFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _token_ids(value: Any, path: Path) -> list[int]:
    """What a file at `path` declares as eos_token_id: nothing, one id, or several."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UnsupportedFormatError(
            f"{path}: eos_token_id: expected a token id, a list of them or null, found {value!r:.64}; correct the file"
        )
    return ids


def _without_special_tokens(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that reads special tokens in text as ordinary characters."""
    text = raw.to_str()
    if isinstance(raw.model, tokenizers.models.Unigram):
        # Its vocabulary holds the special tokens as well, and would find them in text: spell them as no text does.
        state = json.loads(text)
        special = {token["content"] for token in state["added_tokens"] if token["special"]}
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
        vocab = state["model"]["vocab"]
        vocab[:] = [["\U0010fffe" + piece if piece in special else piece, score] for piece, score in vocab]
        text = json.dumps(state)
    plain: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    plain.encode_special_tokens = True
    return plain


def _decoder_types(raw: tokenizers.Tokenizer) -> list[str]:
    decoder = raw.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [part["type"] for part in (state["decoders"] if state["type"] == "Sequence" else [state])]
