"""Workloads are the same for everybody with the same seed, and share what they should share."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from loadtest.traffic.workloads import WORKLOADS, conversations, find_workload, poisson


def first(name: str, seed: str, count: int = 40):
    return list(islice(conversations(find_workload(name), seed), count))


@pytest.mark.parametrize("name", [*WORKLOADS, "32/8"])
def test_a_seed_says_everything(name):
    assert first(name, "a", 5) == first(name, "a", 5)
    assert first(name, "a", 5) != first(name, "b", 5)


def test_no_two_prompts_begin_alike_unless_they_should():
    begins = [call.messages[0][1].split()[:8] for talk in first("chat", "s") for call in talk.calls]
    assert len({tuple(each) for each in begins}) == len(begins)


def test_most_of_a_shared_prefix_workload_shares_its_system_prompt():
    talks = first("shared-prefix", "a", 200) + first("shared-prefix", "b", 200)
    systems = [talk.calls[0].messages[0] for talk in talks if talk.calls[0].messages[0][0] == "system"]
    assert len(set(systems)) == 1
    assert len(systems[0][1].split()) == 2048
    assert 0.84 <= len(systems) / len(talks) <= 0.96


def test_turns_hold_all_that_was_said_before():
    (talk,) = first("multi-turn", "a", 1)
    assert len(talk.calls) == 4
    for before, after in zip(talk.calls, talk.calls[1:], strict=False):
        assert after.messages[: len(before.messages)] == before.messages
        assert [role for role, _ in after.messages[len(before.messages) :]] == ["assistant", "user"]


def test_lengths_are_as_asked():
    (talk,) = first("100/7", "a", 1)
    assert len(talk.calls[0].messages[0][1].split()) == 100
    assert talk.calls[0].max_tokens == 7
    scaled = next(conversations(find_workload("100/7").scaled(0.1), "a"))
    assert len(scaled.calls[0].messages[0][1].split()) == 10
    mean = sum(talk.calls[0].max_tokens for talk in first("chat", "m", 400)) / 400
    assert 110 < mean < 146  # of 128, sigma 0.5: standard error 3.4


def test_an_unknown_workload_lists_what_there_is():
    with pytest.raises(ValueError, match="expected one of chat, rag"):
        find_workload("chatty")


def test_poisson_arrivals_have_the_rate_and_are_not_even():
    found = poisson(50, 40, "a")
    assert 1800 < len(found) < 2200  # 2000, standard deviation 45
    gaps = [after - before for before, after in pairwise(found)]
    assert sum(gap < 0.01 for gap in gaps) / len(gaps) == pytest.approx(1 - 2.718**-0.5, abs=0.05)
    assert poisson(0.001, 1, "a") == [0.0]
