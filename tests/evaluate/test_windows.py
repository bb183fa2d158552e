"""Windows of a text, and clear words about texts that have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.evaluate.windows import cut, read_text
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def test_windows_follow_one_another_from_the_beginning(tokenizer: Tokenizer) -> None:
    text = "abcdefghijklm"
    windows = cut(tokenizer, text, 4, 2)
    assert windows.ids == (tuple(tokenizer.encode("abcd")), tuple(tokenizer.encode("efgh")))
    assert (windows.num_tokens, windows.num_scored) == (13, 6)
    assert len(cut(tokenizer, text, 4).ids) == 3, "the last, incomplete one is left out"
    assert len(cut(tokenizer, text * 20, 4).ids) == 16
    for fact in ("13 tokens", "first 2 non-overlapping windows of 4", "the other 3"):
        assert fact in windows.protocol


def test_no_special_tokens_are_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id is not None
    assert tokenizer.bos_token_id not in cut(tokenizer, "abcd", 4).ids[0]


@pytest.mark.parametrize(
    ("text", "size", "count", "message", "flag"),
    [
        ("a", 4, None, "has 1 token, too few for one window of 4", "--text"),
        ("abc", 4, None, "has 3 tokens, too few", "--text"),
        ("abcdefgh", 4, 3, "enough for 2 windows of 4, and 3 were asked for", "--windows"),
        ("abcdefgh", 4, 0, "expected at least 1", "--windows"),
        ("abcdefgh", 1, None, "expected at least 2", "--window"),
        ("abcdefgh", -5, None, "expected at least 2", "--window"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tokenizer: Tokenizer, text: str, size: int, count: int | None, message: str, flag: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cut(tokenizer, text, size, count)
    assert caught.value.flag == flag


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"gr\xfc\xdfe", "not UTF-8: byte 0xfc at offset 2"),
        (b"\xff\xfea\x00b\x00", "not UTF-8: byte 0xff at offset 0"),
        (b"abc\xe2\x82", "not UTF-8: byte 0xe2 at offset 3"),
    ],
)
def test_hostile_texts_are_refused_in_words(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        read_text(path)
    assert caught.value.flag == "--text"


def test_texts_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_line_ends_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\n")
    assert read_text(path) == "a\r\nb\n"
