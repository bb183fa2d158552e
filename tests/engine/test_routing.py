"""Requests go where the least has to be computed before their first token."""

from __future__ import annotations

from nvfp4_runtime.engine.routing import REQUEST_TOKENS, Load, Memory, Router

IDLE = Load(0, 0)


def send(router: Router, prompt: list[int], loads: list[Load | None], salt: str = "", adapter: str = "") -> int:
    hashes = router.hashes(prompt, salt, adapter)
    best = router.ranked(len(prompt), hashes, loads)[0]
    router.sent(best, len(prompt), hashes)
    return best


def test_idle_engines_take_turns() -> None:
    router = Router([100] * 3, 4)
    assert sorted(send(router, [i], [IDLE] * 3) for i in range(3)) == [0, 1, 2]


def test_a_known_prefix_draws_a_request_to_its_engine_until_that_has_too_much_to_do() -> None:
    router = Router([100] * 2, 4)
    shared = list(range(64))
    home = send(router, [*shared, 1], [IDLE] * 2)
    assert all(send(router, [*shared, i, i + 1], [IDLE] * 2) == home for i in range(5))
    busy: list[Load | None] = [IDLE, IDLE]
    busy[home] = Load(1, 20)
    assert send(router, [*shared, 7], busy) == home, "20 tokens and a request cost less than 64 tokens"
    busy[home] = Load(2, 30)
    assert send(router, [*shared, 8], busy) == 1 - home
    assert send(router, [*shared, 9], busy) == 1 - home, "now it is known there as well"


def test_without_a_prefix_the_least_loaded_engine_is_chosen() -> None:
    router = Router([100] * 3, 4)
    assert send(router, [1, 2], [Load(2, 0), Load(1, 10), Load(1, 50)]) == 1
    assert send(router, [1, 2], [Load(1, REQUEST_TOKENS + 1), Load(2, 0), None]) == 1
    assert router.ranked(2, [], [None, None, None]) == []


def test_salts_and_adapters_share_nothing() -> None:
    router = Router([100] * 2, 4)
    prompt = list(range(40))
    plain = router.hashes(prompt, "", "")
    assert len(plain) == 9, "the last block has to be computed: it holds the last token"
    for other in (router.hashes(prompt, "a", ""), router.hashes(prompt, "", "a")):
        assert not set(plain) & set(other)


def test_it_remembers_as_much_as_the_cache_holds_and_prefixes_longest() -> None:
    memory = Memory(3)
    memory.note([b"a", b"b", b"c", b"d"])
    assert memory.matching([b"a", b"b", b"c", b"d"]) == 3
    memory.note([b"x"])
    assert memory.matching([b"a", b"b", b"c"]) == 2
    assert len(memory.blocks) == 3


def test_counts_say_how_many_tokens_should_have_been_found() -> None:
    router = Router([100], 4)
    for _ in range(2):
        send(router, list(range(10)), [IDLE])
    assert (router.num_matched, router.num_tokens) == (8, 20)
    router.forget(0)
    send(router, list(range(10)), [IDLE])
    assert router.num_matched == 8


def test_without_prefix_caches_only_load_counts() -> None:
    router = Router([100] * 2, 4, remembers=False)
    assert {send(router, list(range(10)), [IDLE] * 2) for _ in range(2)} == {0, 1}
