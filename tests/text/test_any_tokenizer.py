"""What holds for every kind of tokenizer: streamed text is whole, exact and the same however it is cut."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nvfp4_runtime.text.chat_template import render_to_ids
from nvfp4_runtime.text.detokenizer import Detokenizer
from nvfp4_runtime.text.simulated import byte_tokenizer, chatml_template
from nvfp4_runtime.text.tokenizer import BYTE_LEVEL_ALPHABET, Tokenizer
from tests.text.conftest import make_sentencepiece, make_wordlevel

REPLACEMENT = "\ufffd"


def make_byte_level_with_merges() -> Tokenizer:
    """Like GPT-2's or Qwen's: merges that cut characters in two, and added tokens outside ASCII (DeepSeek's)."""
    spelled = {byte: char for char, byte in BYTE_LEVEL_ALPHABET.items()}
    pairs = [(0xF0, 0x9F), (0xE6, 0x97), (0xA5, 0x20), (0xC3, 0xA9), (0x20, 0xE6), (0x61, 0xF0)]
    merges = [(spelled[a], spelled[b]) for a, b in pairs]
    vocab = dict(BYTE_LEVEL_ALPHABET)
    for a, b in merges:
        vocab[a + b] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<｜end▁of▁sentence｜>", special=True, normalized=False)])
    raw.add_tokens([AddedToken("déjà", special=False, normalized=False), AddedToken("  ", normalized=False)])
    return Tokenizer(raw, {"eos_token": "<｜end▁of▁sentence｜>"})


def make_metaspace_bpe() -> Tokenizer:
    """Like Mistral's or TinyLlama's: BPE over U+2581, byte fallback, Metaspace's own decoder beside it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "é", "日", "!", "▁a", "ab"):
        vocab[piece] = len(vocab)
    raw = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    return Tokenizer(raw, {"bos_token": "<s>", "eos_token": "</s>"})


KINDS = {
    "bytes": byte_tokenizer(),
    "byte-level": make_byte_level_with_merges(),
    "sentencepiece": make_sentencepiece(),
    "metaspace": make_metaspace_bpe(),
}
ALPHABET = [
    "a",
    "b",
    "ab",
    " ",
    "é",
    "日",
    "本",
    "🎉",
    "!",
    "\n",
    "déjà",
    "  ",
    "Hello",
    "👩‍👩‍👧",
    "\u0301",
    "<s>",
    "<",
]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join)
every_kind = pytest.mark.parametrize("kind", KINDS)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int], **options: object) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt, **options)  # type: ignore[arg-type]
    shown = []
    for token_id in ids:
        shown.append(detokenizer.push(token_id))
        if detokenizer.stopped_by is not None:
            return shown
    return [*shown, detokenizer.flush()]


def exact(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids after some other text: all their bytes, each run that is no character one U+FFFD."""
    return b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids).decode("utf-8", "replace")


def some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    tokenizer = KINDS[kind]
    chars = [i for i in range(tokenizer.vocab_size) if any(byte > 127 for byte in tokenizer.token_bytes(i))]
    return st.lists(st.sampled_from(chars) | st.integers(0, tokenizer.vocab_size - 1), max_size=16)


@every_kind
@settings(deadline=None)
@given(st.data())
def test_streamed_text_is_the_text_and_no_event_breaks_a_character(kind: str, data: st.DataObject) -> None:
    tokenizer, text = KINDS[kind], data.draw(TEXTS)
    prompt = tokenizer.encode_plain("a")
    ids = tokenizer.encode_plain("a" + text)
    if ids[: len(prompt)] != prompt:
        return  # the text joined the prompt's token
    events = stream(tokenizer, ids[len(prompt) :], prompt)
    assert "".join(events) == text
    assert not any(REPLACEMENT in event for event in events)


@every_kind
@settings(deadline=None)
@given(st.data())
def test_any_ids_stream_as_their_bytes(kind: str, data: st.DataObject) -> None:
    tokenizer, ids = KINDS[kind], data.draw(some_ids(kind))
    prompt = tokenizer.encode_plain("a")
    assert "".join(stream(tokenizer, ids, prompt)) == exact(tokenizer, ids)


@every_kind
@settings(deadline=None)
@given(st.data())
def test_no_piece_of_a_stop_string_is_shown_whatever_the_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer, ids = KINDS[kind], data.draw(some_ids(kind))
    prompt = tokenizer.encode_plain("a")
    whole = exact(tokenizer, ids)
    stops = data.draw(st.lists(st.text("ab é日\ufffd", min_size=1, max_size=3), min_size=1, max_size=3))
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 4))])
    ends = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
    cut = min(ends)[0] + min(ends)[1] if ends else len(whole)
    shown = stream(tokenizer, ids, prompt, stop=stops)
    assert "".join(shown) == whole[:cut]
    if ends:
        return
    assert all(whole.startswith("".join(shown[:i])) for i in range(len(shown)))


@every_kind
@settings(deadline=None)
@given(st.data())
def test_every_token_has_a_text_of_its_own_for_logprobs(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode_plain(data.draw(TEXTS))
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert joined.decode().strip(" ") == tokenizer.decode(ids, skip_special_tokens=False).strip(" ")
    assert all(tokenizer.token_text(i) == tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)


@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
@settings(deadline=None)
@given(
    content=st.lists(st.sampled_from(["<|im_end|>", "<｜end▁of▁sentence｜>", "<|", "im_end|>", "a", "<"]), max_size=6)
)
def test_what_users_write_never_becomes_a_special_token(kind: str, content: list[str]) -> None:
    tokenizer = KINDS[kind]
    said = "".join(content)
    template = chatml_template(tokenizer)
    rendered, ids = render_to_ids(template, tokenizer, [{"role": "user", "content": said}])
    _, bare = render_to_ids(template, tokenizer, [{"role": "user", "content": ""}])
    specials = [i for i in ids if i in tokenizer.special_ids]
    assert specials == [i for i in bare if i in tokenizer.special_ids]
    assert said in rendered
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_spaces_between_special_tokens_can_be_left_out_where_the_decoder_writes_them() -> None:
    raw = tokenizers.Tokenizer.from_str(make_wordlevel()._raw.to_str())
    raw.add_special_tokens(["[A]", "[B]"])
    tokenizer = Tokenizer(raw)
    a, b = tokenizer.encode("[A][B]")
    ids = [1, a, b, 3]

    def text(**options: object) -> str:
        return "".join(stream(tokenizer, ids, [], **options))

    assert text(skip_special_tokens=False) == "play [A] [B] now"
    assert text(skip_special_tokens=False, spaces_between_special_tokens=False) == "play [A][B] now"
    assert text(skip_special_tokens=True, spaces_between_special_tokens=False) == "play now"


def test_bytes_that_make_no_character_spoil_nothing_beside_them() -> None:
    tokenizer = KINDS["metaspace"]
    ids = [3 + byte for byte in "あ".encode()] + [3 + 0x80] + tokenizer.encode_plain("!")[1:]
    assert "".join(stream(tokenizer, ids, [])) == "あ" + REPLACEMENT + "!"
