"""Frames on the socket between server and engine: four bytes of length, then msgpack."""

from __future__ import annotations

import msgspec

from nvfp4_runtime.engine.messages import FromEngine, ToEngine

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """One message with its length in front."""
    payload = _encoder.encode(message)
    return len(payload).to_bytes(HEADER_BYTES, "little") + payload


class FrameBuffer:
    """Bytes in, whole payloads out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Every payload completed by `data`. Raises ValueError on a length that no message of ours has."""
        self._buffer += data
        payloads = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            size = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "little")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes was announced; the most is {MAX_FRAME_BYTES}")
            end = start + HEADER_BYTES + size
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + HEADER_BYTES : end]))
            start = end
        del self._buffer[:start]
        return payloads
