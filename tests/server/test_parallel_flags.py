"""--tensor-parallel-size and what torchrun or LeaderWorkerSet say: one place among the ranks, or a clear refusal."""

from __future__ import annotations

import pytest

from nvfp4_runtime.config import KVEventsConfig, ParallelConfig
from nvfp4_runtime.errors import ConfigError
from server.commands.parallel import kv_events, parallel_config
from tests.server.test_cli import serve_arguments

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
LWS = {"LWS_LEADER_ADDRESS": "leader.svc", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}


def place(size: int, environment: dict[str, str], *flags: str) -> ParallelConfig:
    return parallel_config(serve_arguments("/model", "--tensor-parallel-size", str(size), *flags), environment)


def test_the_flag_alone_has_ranks_started_here() -> None:
    assert place(2, {}) == ParallelConfig(2)


@pytest.mark.parametrize("environment", [{}, TORCHRUN, LWS])
def test_without_the_flag_an_environment_made_for_others_says_nothing(environment: dict[str, str]) -> None:
    assert place(1, environment) == ParallelConfig()


def test_torchrun_and_a_leader_worker_set_say_who_we_are_and_where_to_meet() -> None:
    assert place(2, TORCHRUN) == ParallelConfig(2, 1, "10.0.0.1", 1234, None, 1)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert place(2, TORCHRUN | agent) == ParallelConfig(2, 1, "10.0.0.1", 1234, "2", 1)
    assert place(2, LWS) == ParallelConfig(2, 1, "leader.svc", 29500, None, 0)
    assert place(2, LWS | TORCHRUN | {"RANK": "0"}) == ParallelConfig(2, 1, "leader.svc", 1234, None, 1)


@pytest.mark.parametrize(
    ("size", "environment", "flags", "said"),
    [
        (0, {}, (), "expected 1 or more"),
        (2, {}, ("--simulate",), "--simulate has none"),
        (4, TORCHRUN, (), "says that 2 processes"),
        (2, TORCHRUN | {"MASTER_ADDR": ""}, (), "MASTER_ADDR is not"),
        (2, TORCHRUN | {"RANK": "2"}, (), "RANK is 2"),
        (2, TORCHRUN | {"RANK": "first"}, (), "RANK, found 'first'"),
        (2, {"LWS_LEADER_ADDRESS": "h", "LWS_GROUP_SIZE": "2"}, (), "LWS_WORKER_INDEX"),
    ],
)
def test_what_contradicts_itself_is_refused(
    size: int, environment: dict[str, str], flags: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        place(size, environment, *flags)


def test_kv_events_are_off_unless_asked_for_and_heard_on_this_host_alone() -> None:
    assert kv_events(None) is None
    assert kv_events('{"enable_kv_cache_events": false}') is None
    assert kv_events('{"publisher": "null"}') is None
    found = kv_events('{"enable_kv_cache_events": true, "publisher": "zmq", "topic": "kv", "buffer_steps": 5}')
    assert found == KVEventsConfig(topic="kv", buffer_steps=5)
    assert found.endpoint.startswith("tcp://127.0.0.1:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "JSON object"),
        ('{"publisher": "nats"}', "expected zmq"),
        ('{"max_queue_size": 5}', "'max_queue_size' is not known"),
        ('{"hwm": 0}', "1 or more"),
        ('{"endpoint": 5557}', "text"),
    ],
)
def test_kv_events_that_cannot_be_had_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kv_events(text)
