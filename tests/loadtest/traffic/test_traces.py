"""Recorded traffic is replayed at its instants and lengths; prefixes that were shared are shared."""

from __future__ import annotations

import pytest

from loadtest.traffic.traces import SAMPLES, read_trace, replay

MOONCAKE = '{"timestamp": 500, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2, 7]}\n' * 1
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,20,30,50,API log\n"


@pytest.mark.parametrize("name", ["mooncake.jsonl", "burstgpt.csv"])
def test_the_samples_are_read_and_replayed(name):
    recorded = read_trace(SAMPLES / name)
    assert recorded[0].at == 0
    assert 180 <= len(recorded) <= 200
    talks = replay(recorded, "a", speedup=2.0, scale=0.1)
    assert len(talks) == len(recorded)
    assert talks[-1].at == recorded[-1].at / 2
    longest = max(range(len(recorded)), key=lambda i: recorded[i].prompt)
    assert len(talks[longest].calls[0].messages[0][1].split()) == round(recorded[longest].prompt * 0.1)
    assert len(replay(recorded, "a", seconds=5.0)) < len(recorded)


def test_equal_hash_ids_are_equal_beginnings(tmp_path):
    file = tmp_path / "t"
    other = MOONCAKE.replace("7]", "9]").replace("500", "800")
    file.write_text(MOONCAKE + other)
    (one,), (two,) = (talk.calls for talk in replay(read_trace(file), "a"))
    first, second = one.messages[0][1].split(), two.messages[0][1].split()
    assert len(first) == len(second) == 1100
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:]


def test_a_request_that_got_no_answer_is_not_replayed(tmp_path):
    file = tmp_path / "t"
    file.write_text(BURST + "6,GPT-4,20,0,20,API log\n9,GPT-4,7,8,15,API log\n")
    assert [(each.at, each.prompt, each.answer) for each in read_trace(file)] == [(0.0, 20, 30), (4.0, 7, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "expected Mooncake's JSON lines or BurstGPT's CSV"),
        (MOONCAKE + '{"timestamp": 1}\n', "t:2: .*input_length"),
        (MOONCAKE.replace("1100", "0"), "t:1: .*at least one token"),
        (BURST + "x,GPT-4,1,1,2,API log\n", "t:3: expected numbers"),
        (BURST.splitlines()[0] + "\n", "no request"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "t"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(file)
