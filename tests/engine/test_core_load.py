"""What the engine's process says when a model cannot be loaded."""

from __future__ import annotations

import socket

import pytest

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine import core
from nvfp4_runtime.engine.messages import Failed, Start
from nvfp4_runtime.engine.wire import FrameBuffer, decode_from_engine, frame


def test_a_file_the_system_does_not_give_is_a_checkpoint_error_with_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/models/m/config.json")

    monkeypatch.setattr(core, "build", refuse)
    monkeypatch.setattr(core.gc, "disable", lambda: None)  # for the rest of its process, which here is the tests'
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(Start(EngineConfig("/models/m"))))
        assert core.EngineCore(theirs).run() == 2
        (payload,) = FrameBuffer().feed(ours.recv(1 << 16))
    failed = decode_from_engine(payload)
    assert isinstance(failed, Failed)
    assert failed.kind == "CheckpointError"
    assert failed.message.startswith("Permission denied: /models/m/config.json; ")
