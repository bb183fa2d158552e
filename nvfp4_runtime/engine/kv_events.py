"""What enters and leaves the prefix cache, told to routers over ZeroMQ as vLLM tells it. Torch-free; pyzmq on demand.

A message has three frames: topic, sequence number (8 bytes, big-endian), and a batch in msgpack, which is the array
[seconds since 1970, events, data-parallel rank]. An event is an array as well, its name first:

["BlockStored", block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name]
["BlockRemoved", block_hashes, medium]
["AllBlocksCleared"]

Hashes are whole numbers of 64 bits: they name blocks, and cannot be computed from tokens by others, since they are
keyed anew in each engine. A router that wants hashes of its own makes them from token_ids.

Token ids are what clients wrote: whoever can subscribe can read every prompt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from nvfp4_runtime.config import KVEventsConfig
from nvfp4_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

FLAG = "--kv-events-config"
LINGER_MS = 200  # for what was published to leave, once the engine ends
_END = (-1).to_bytes(8, "big", signed=True)  # what a replay ends with, in place of a sequence number


class _Event(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    pass


class BlockStored(_Event):
    """A run of full blocks of one prompt or answer can be found from now on; the first one follows the parent."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(_Event):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(_Event):
    pass


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVEvents:
    """Collects a step's events, in their order, and hands them to a publisher as one batch."""

    def __init__(self, publisher: Publisher, block_size: int, medium: str, replica: int = 0) -> None:
        self._publisher = publisher
        self._block_size, self._medium, self._replica = block_size, medium, replica
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = [AllBlocksCleared()]
        self.flush()  # an engine that takes another's place has nothing of what that one had

    def stored(self, digest: bytes, parent: bytes | None, tokens: Sequence[int], adapter: str) -> None:
        """A block can be found. Blocks that follow each other are told in one event."""
        number, above = _number(digest), None if parent is None else _number(parent)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and last.block_hashes[-1] == above:
            last.block_hashes.append(number)
            last.token_ids.extend(tokens)
            return
        name = adapter or None
        self._events.append(BlockStored([number], above, list(tokens), self._block_size, None, self._medium, name))

    def removed(self, digest: bytes) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(_number(digest))
        else:
            self._events.append(BlockRemoved([_number(digest)], self._medium))

    def cleared(self) -> None:
        self._events = [AllBlocksCleared()]

    def flush(self) -> None:
        if self._events:
            self._publisher.publish(EventBatch(time.time(), self._events, self._replica))
            self._events = []


class Publisher:
    """A PUB socket, and a ROUTER that sends again what a subscriber missed, where one is asked for.

    Sending never waits: what a slow subscriber has no room for is lost to it, which it sees in the sequence numbers.
    """

    def __init__(self, config: KVEventsConfig, replica: int = 0) -> None:
        """Raises ConfigError when pyzmq is missing, or an address cannot be had."""
        try:
            import zmq
        except ImportError as error:
            raise ConfigError(
                f"{FLAG} needs the package pyzmq: pip install 'nvfp4-runtime[kv-events]'", FLAG
            ) from error
        self._zmq = zmq
        self._context = zmq.Context()
        self._topic = config.topic.encode()
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._lock = threading.Lock()
        self._socket = self._bind(zmq.PUB, config.endpoint, replica, config.hwm)
        if config.replay_endpoint is not None:
            router = self._bind(zmq.ROUTER, config.replay_endpoint, replica, config.hwm)
            threading.Thread(target=self._replay, args=(router,), daemon=True, name="kv events, again").start()

    def publish(self, batch: EventBatch) -> None:
        payload = msgspec.msgpack.encode(batch)
        with self._lock:
            number, self._sequence = self._sequence, self._sequence + 1
            self._kept.append((number, payload))
        self._socket.send_multipart((self._topic, number.to_bytes(8, "big"), payload), self._zmq.NOBLOCK)

    def close(self) -> None:
        """Each thread closes its own socket: libzmq ends the process where one is closed while another is in it."""
        self._socket.close(LINGER_MS)
        self._context.term()  # ends the other thread's wait, and waits until it has closed its own

    def _bind(self, kind: int, endpoint: str, replica: int, hwm: int) -> Any:
        address = of_replica(endpoint, replica)
        sock = self._context.socket(kind)
        sock.set_hwm(hwm)
        sock.linger = LINGER_MS
        try:
            sock.bind(address)
        except self._zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{FLAG}: cannot listen on {address}: {error}", FLAG) from error
        logger.info("KV events on %s", address)
        return sock

    def _replay(self, router: Any) -> None:
        """Answer requests, each the first sequence number that is wanted, until the context ends."""
        with router:
            while True:
                try:
                    peer, *_, start = router.recv_multipart()
                    with self._lock:
                        kept = list(self._kept)
                    for number, payload in kept:
                        if number >= int.from_bytes(start, "big"):
                            router.send_multipart((peer, b"", number.to_bytes(8, "big"), payload))
                    router.send_multipart((peer, b"", _END, b""))
                except self._zmq.ContextTerminated:
                    return
                except self._zmq.ZMQError as error:
                    logger.warning("a request for past KV events could not be answered: %s", error)


def of_replica(endpoint: str, replica: int) -> str:
    """Engines of one server take ports one after the other, from the given one on."""
    if replica == 0:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://") and port.isdecimal():
        return f"{head}:{int(port) + replica}"
    return f"{endpoint}_dp{replica}"


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
