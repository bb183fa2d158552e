"""Chunks: what is serialised once per answer gives the same bytes as what is serialised each time."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from server.streaming import ChunkWriter

WRITER = ChunkWriter("cmpl-1", "text_completion", 1700000000, 'a "quoted" model', "nvfp4-test")


def choice(text: str) -> dict[str, Any]:
    return {"index": 3, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_chunk_has_the_bytes_of_a_chunk_written_whole(text: str) -> None:
    written = WRITER.text_chunk(choice)(text)
    assert written == WRITER.choice(choice(text))
    assert orjson.loads(written.removeprefix(b"data: "))["choices"] == [choice(text)]
