"""Who holds what in a team: every part once, cuts between blocks, refusals that name what is too small."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.parallel import Alone, share, share_columns, share_heads


def team(size: int) -> list[Alone]:
    return [Alone(rank, size) for rank in range(size)]


@pytest.mark.parametrize(("total", "size"), [(1, 1), (8, 2), (9, 2), (7, 4), (4, 4), (49152, 3)])
def test_every_thing_has_one_owner_and_shares_differ_by_one_at_most(total: int, size: int) -> None:
    runs = [share(total, each, "things") for each in team(size)]
    assert [i for run in runs for i in run] == list(range(total))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert [share(total, team(size)[0], "things", rank) for rank in range(size)] == runs


@pytest.mark.parametrize(
    ("total", "size", "lengths"),
    [(1536, 2, [768, 768]), (96, 2, [48, 48]), (96, 4, [32, 32, 16, 16]), (576, 2, [288, 288]), (100, 1, [100])],
)
def test_columns_are_cut_between_blocks_and_evenly_where_that_can_be(total: int, size: int, lengths: list[int]) -> None:
    runs = [share_columns(total, each, "columns") for each in team(size)]
    assert [len(run) for run in runs] == lengths
    assert all(a.stop == b.start for a, b in pairwise(runs))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (4, 2, 2, [(range(0, 2), range(0, 1)), (range(2, 4), range(1, 2))]),
        (9, 3, 2, [(range(0, 6), range(0, 2)), (range(6, 9), range(2, 3))]),
        (
            4,
            2,
            4,
            [(range(i, i + 1), range(i // 2, i // 2 + 1)) for i in range(4)],  # keys and values twice each
        ),
        (9, 3, 4, [(range(0, 2), range(0, 1)), (range(2, 3), range(0, 1)), (range(3, 6), range(1, 2))]),
    ],
)
def test_query_heads_stay_with_their_keys_and_values(
    heads: int, kv_heads: int, size: int, expected: list[tuple[range, range]]
) -> None:
    found = [share_heads(heads, kv_heads, each) for each in team(size)]
    assert found[: len(expected)] == expected
    assert [head for own, _ in found for head in own] == list(range(heads))
    per_group = heads // kv_heads
    for own, kv in found:
        assert {head // per_group for head in own} == set(kv)


@pytest.mark.parametrize(
    "refused",
    [
        lambda each: share(1, each, "groups of Mamba-2 heads"),
        lambda each: share_columns(16, each, "inner columns"),
        lambda each: share_columns(100, each, "inner columns"),
        lambda each: share_heads(1, 1, each),
    ],
)
def test_a_team_too_large_is_refused_by_flag_and_by_what_is_too_small(refused) -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2: .*(groups|inner|query)"):
        refused(Alone(1, 2))
