"""Text while it arrives: whole characters, no piece of a stop string, and the same whole text in the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_runtime.text.detokenizer import Detokenizer, StopScanner
from nvfp4_runtime.text.simulated import byte_tokenizer
from nvfp4_runtime.text.tokenizer import Tokenizer
from tests.text.conftest import make_sentencepiece, make_wordlevel

BYTES = byte_tokenizer()
SENTENCEPIECE = make_sentencepiece()
REPLACEMENT = "\ufffd"


def pieces(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    """What each token releases, and what the end releases."""
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.text(max_size=40))
def test_no_character_is_broken_whatever_the_tokens(text: str) -> None:
    parts = pieces(BYTES, list(text.encode()))
    assert "".join(parts) == text
    assert all(REPLACEMENT not in part for part in parts) or REPLACEMENT in text


@given(st.lists(st.integers(0, 258), max_size=40), st.booleans())
def test_byte_level_text_equals_the_whole_decode_for_any_tokens(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTES, ids, skip_special_tokens=skip)) == BYTES._raw.decode(ids, skip_special_tokens=skip)


def test_text_comes_as_soon_as_its_character_is_complete() -> None:
    assert pieces(BYTES, list("aé🎉b".encode())) == ["a", "", "é", "", "", "", "🎉", "b", ""]


def test_unfinished_character_becomes_one_replacement_at_the_end() -> None:
    assert pieces(BYTES, [97, 0xF0, 0x9F]) == ["a", "", "", REPLACEMENT]


def test_bytes_that_never_make_a_character_do_not_hold_up_what_follows() -> None:
    parts = pieces(BYTES, [0xFF, 97, 0x80, 98])
    assert parts == [REPLACEMENT, "a", REPLACEMENT, "b", ""]


@given(st.lists(st.sampled_from(["Hello", "world", "日", "本", "a", "!", "é", "🎉", " ", "ü"]), max_size=12))
def test_sentencepiece_with_byte_fallback_gives_the_text_in_whole_characters(words: list[str]) -> None:
    text = "".join(words)
    prompt = SENTENCEPIECE.encode("Hello", add_special_tokens=False)
    ids = SENTENCEPIECE.encode("Hello" + text, add_special_tokens=False)
    if ids[: len(prompt)] != prompt:
        return  # the text joined the prompt's last word
    parts = pieces(SENTENCEPIECE, ids[len(prompt) :], prompt_ids=prompt)
    assert "".join(parts) == text, "spaces at the seam between prompt and text included"
    assert all(REPLACEMENT not in part for part in parts)


def test_sentencepiece_bytes_that_make_no_character_come_out_after_a_few_tokens() -> None:
    a = SENTENCEPIECE._raw.token_to_id("a")
    parts = pieces(SENTENCEPIECE, [a, *[3 + 0xFF] * 6, a], prompt_ids=[a])
    assert parts[0] == "a"
    assert "".join(parts).startswith("a" + REPLACEMENT)
    assert "".join(parts).endswith("a")
    assert any(REPLACEMENT in part for part in parts[:7]), "they must not be held for ever"


def test_wordpiece_spaces_are_those_of_the_whole_decode() -> None:
    tokenizer = make_wordlevel()
    assert "".join(pieces(tokenizer, [1, 2, 3, 1])) == tokenizer.decode([1, 2, 3, 1]) == "playing now play"


def test_special_tokens_are_skipped_or_shown() -> None:
    assert "".join(pieces(BYTES, [97, 258, 98])) == "ab"
    assert "".join(pieces(BYTES, [97, 258, 98], skip_special_tokens=False)) == "a<|im_end|>b"


# -- stop strings -------------------------------------------------------------------------------------------------

SMALL = st.text(alphabet="abé", max_size=12)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3)


def reference_cut(text: str, stops: list[str], include: bool, immune: int = 0) -> tuple[str, str | None]:
    """Read left to right: the first position where some stop string ends decides, the longest one if several do."""
    for end in range(immune + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(SMALL, STOPS, st.booleans(), st.lists(st.integers(0, 12), max_size=5))
def test_cut_does_not_depend_on_how_the_text_arrives(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    expected, stop = reference_cut(text, stops, include)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    scanner = StopScanner(stops, include)
    shown = [scanner.push(text[a:b]) for a, b in itertools.pairwise(bounds)]
    if scanner.found is None:
        shown.append(scanner.flush())
    assert "".join(shown) == expected
    assert scanner.found == stop


@given(SMALL, STOPS)
def test_nothing_shown_is_ever_taken_back_by_a_stop_string(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(BYTES, stop=stops)
    shown = ""
    for token_id in text.encode():
        shown += detokenizer.push(token_id)
        if detokenizer.stopped_by is not None:
            break
    else:
        shown += detokenizer.flush()
    assert shown == reference_cut(text, stops, False)[0]


def test_text_is_held_only_while_it_can_become_a_stop_string() -> None:
    assert pieces(BYTES, list(b"xENxEND"), stop=["END"]) == ["x", "", "", "ENx", "", "", "", ""]


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaab"), (9, "aaab")])
def test_stop_strings_within_min_tokens_do_not_count(min_tokens: int, expected: str) -> None:
    detokenizer = Detokenizer(BYTES, stop=["a"], min_tokens=min_tokens)
    shown = ""
    for token_id in b"aaab":
        shown += detokenizer.push(token_id)
        if detokenizer.stopped_by is not None:
            break
    else:
        shown += detokenizer.flush()
    assert shown == expected


def test_stop_string_may_begin_within_min_tokens_and_end_after_them() -> None:
    detokenizer = Detokenizer(BYTES, stop=["bcd"], min_tokens=2)
    shown = "".join(detokenizer.push(token_id) for token_id in b"abcd")
    assert (shown, detokenizer.stopped_by) == ("a", "bcd")


def test_nothing_comes_out_after_a_stop_string() -> None:
    detokenizer = Detokenizer(BYTES, stop=["b"])
    assert "".join(detokenizer.push(token_id) for token_id in b"abcd") == "a"
    assert detokenizer.flush() == ""


def test_stop_string_of_special_tokens_works_when_they_are_shown() -> None:
    detokenizer = Detokenizer(BYTES, stop=["<|im_end|>"], skip_special_tokens=False)
    assert detokenizer.push(97) + detokenizer.push(258) == "a"
    assert detokenizer.stopped_by == "<|im_end|>"


@given(
    st.lists(st.sampled_from([97, 98, 99, 0xC3, 0xA9, 258]), max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_pushing_all_gives_what_pushing_one_by_one_gives(ids: list[int], stop: list[str]) -> None:
    one_by_one, all_at_once = Detokenizer(BYTES, stop=stop), Detokenizer(BYTES, stop=stop)
    text, num_taken = "", 0
    for token_id in ids:
        if one_by_one.stopped_by is None:
            text, num_taken = text + one_by_one.push(token_id), num_taken + 1
    assert all_at_once.push_all(ids) == (text, num_taken)
    assert all_at_once.stopped_by == one_by_one.stopped_by
