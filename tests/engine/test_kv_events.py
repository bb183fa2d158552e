"""Events of the prefix cache: what a subscriber hears is what the cache holds, in vLLM's format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from nvfp4_runtime.config import KVEventsConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.kv_events import EventBatch, KVEvents, Publisher, of_replica
from nvfp4_runtime.errors import ConfigError
from tests.engine.helpers import make_engine, run_to_end, submit

REPOSITORY = Path(__file__).parents[2]


class Listener:
    """Keeps the cache's content as it is told, and every batch."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}
        self.batches: list[Any] = []

    def publish(self, batch: EventBatch) -> None:
        self.take(msgspec.msgpack.encode(batch))

    def take(self, payload: bytes) -> None:
        """From the bytes alone, as another program would."""
        batch = msgspec.msgpack.decode(payload)
        self.batches.append(batch)
        _, events, rank = batch
        assert rank == 0
        for name, *fields in events:
            if name == "BlockStored":
                hashes, parent, tokens, size, lora_id, medium, _ = fields
                assert (size, lora_id, medium, len(tokens)) == (4, None, "CPU", 4 * len(hashes))
                for i, number in enumerate(hashes):
                    assert number not in self.blocks, "stored twice"
                    assert parent is None or parent in self.blocks, "a block without its parent"
                    self.blocks[number] = (parent, tokens[4 * i : 4 * i + 4])
                    parent = number
            elif name == "BlockRemoved":
                for number in fields[0]:
                    del self.blocks[number]
            else:
                assert name == "AllBlocksCleared"
                self.blocks.clear()

    def tokens(self, number: int) -> list[int]:
        parent, own = self.blocks[number]
        return own if parent is None else [*self.tokens(parent), *own]


def told(listener: Any, **options: object) -> Engine:
    engine = make_engine(**options)
    engine.tell(KVEvents(listener, 4, "CPU"))
    return engine


def cached(engine: Engine) -> set[int]:
    return {int.from_bytes(digest[:8], "big") for digest in engine.scheduler.pool._block_of}


def test_a_listener_knows_what_the_cache_holds_whatever_happens() -> None:
    """Small enough that blocks are taken from each other and requests preempted."""
    listener = Listener()
    engine = told(listener, num_blocks=17, max_model_len=48)
    for round_number in range(6):
        for i in range(5):
            prompt = [round_number % 2] * 8 + [i] * (3 * i + 1)
            engine.add(submit(f"{round_number}-{i}", prompt, 9))
        if round_number == 3:
            engine.step()
            engine.abort("3-0")
        run_to_end(engine)
        assert set(listener.blocks) == cached(engine)
    removed = [event for _, events, _ in listener.batches for event in events if event[0] == "BlockRemoved"]
    assert removed, "the cache was never full: the test shows nothing"
    assert engine.scheduler.num_preemptions > 0
    engine.scheduler.start_over(without=None)
    engine.scheduler.events.flush()  # type: ignore[union-attr]  # it has some: told above
    assert listener.blocks == {}


def test_a_run_of_blocks_is_one_event_that_spells_the_prompt() -> None:
    listener = Listener()
    engine = told(listener)
    prompt = list(range(20, 43))
    engine.add(submit("r", prompt, 1))
    run_to_end(engine)
    assert listener.batches[0][1] == [["AllBlocksCleared"]]
    (batch,) = listener.batches[1:]
    ((name, hashes, parent, tokens, *_),) = batch[1]
    assert (name, len(hashes), parent, tokens) == ("BlockStored", 5, None, prompt[:20])
    assert listener.tokens(hashes[-1]) == prompt[:20]
    assert all(0 <= number < 2**64 for number in hashes)


@pytest.fixture
def endpoints() -> tuple[str, str]:
    context = zmq.Context()
    with context.socket(zmq.PUB) as sock:
        ports = [sock.bind_to_random_port("tcp://127.0.0.1") for _ in range(2)]
    context.term()
    return tuple(f"tcp://127.0.0.1:{port}" for port in ports)  # type: ignore[return-value]  # two of them


def test_subscribers_get_topic_number_and_batch_and_what_they_missed(endpoints: tuple[str, str]) -> None:
    publisher = Publisher(KVEventsConfig(endpoints[0], endpoints[1], topic="kv", buffer_steps=3))
    context = zmq.Context()
    with context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as again:
        sub.setsockopt(zmq.RCVTIMEO, 5000)
        again.setsockopt(zmq.RCVTIMEO, 5000)
        sub.subscribe("kv")
        sub.connect(endpoints[0])
        again.connect(endpoints[1])
        number = 0
        while not sub.poll(20):  # until the subscription has arrived
            publisher.publish(EventBatch(float(number), [], 0))
            number += 1
            assert number < 250
        topic, first, payload = sub.recv_multipart()
        assert topic == b"kv"
        assert msgspec.msgpack.decode(payload) == [float(int.from_bytes(first, "big")), [], 0]
        for _ in range(4):
            publisher.publish(EventBatch(float(number), [], 0))
            number += 1
        again.send_multipart((b"", (number - 2).to_bytes(8, "big")))
        heard = []
        while True:
            _, sequence, _payload = again.recv_multipart()
            heard.append(int.from_bytes(sequence, "big", signed=True))
            if heard[-1] == -1:
                break
        assert heard == [number - 2, number - 1, -1]
    publisher.close()
    context.term()


def test_an_end_in_the_midst_of_an_answer_ends_nothing_else(tmp_path: Path) -> None:
    """A socket closed under the thread that is in it ended the process: some three times in a hundred, in libzmq."""
    code = f"""
import zmq
from nvfp4_runtime.config import KVEventsConfig
from nvfp4_runtime.engine.kv_events import Publisher
for i in range(150):
    publisher = Publisher(KVEventsConfig(f"ipc://{tmp_path}/a{{i}}", f"ipc://{tmp_path}/b{{i}}"))
    with zmq.Context() as context, context.socket(zmq.DEALER) as again:
        again.linger = 0
        again.connect(f"ipc://{tmp_path}/b{{i}}")
        again.send_multipart((b"", bytes(8)))
        again.recv_multipart()
        publisher.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_address_that_is_taken_ends_the_start(endpoints: tuple[str, str]) -> None:
    publisher = Publisher(KVEventsConfig(endpoints[0]))
    with pytest.raises(ConfigError, match="cannot listen on tcp://127"):
        Publisher(KVEventsConfig(endpoints[0]))
    publisher.close()


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("tcp://*:5557", "tcp://*:5559"), ("ipc:///run/kv", "ipc:///run/kv_dp2"), ("inproc://kv:1", "inproc://kv:1_dp2")],
)
def test_engines_of_one_server_publish_side_by_side(endpoint: str, expected: str) -> None:
    assert of_replica(endpoint, 0) == endpoint
    assert of_replica(endpoint, 2) == expected
