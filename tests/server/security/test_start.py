"""What `nvfp4 serve` starts with, and without which flags it does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.errors import ConfigError
from server.cli import _parser, main
from server.commands.security import is_loopback
from server.config import ServerConfig
from server.configs import engine_config, server_config


def config(*flags: str) -> ServerConfig:
    return server_config(_parser()[0].parse_args(["serve", "--simulate", *flags]), None)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("10.0.0.1", False), ("example.com", False), ("localhost.example.com", False),
     ("::ffff:1.2.3.4", False)],
)  # fmt: skip
def test_loopback_is_told_from_what_others_reach(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_default_is_this_machine_alone() -> None:
    assert _parser()[0].parse_args(["serve"]).host == "127.0.0.1"
    assert config().api_key_hashes == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com"])
def test_open_address_needs_a_key_or_the_word_that_none_is_meant(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--simulate", "--port", "0", "--host", host]) == 1
    said = capsys.readouterr().err
    assert "--api-key-file" in said
    assert "--allow-unauthenticated" in said
    assert config("--host", host, "--allow-unauthenticated").api_key_hashes == ()
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    assert len(config("--host", host, "--api-key-file", str(keys)).api_key_hashes) == 2


def test_limits_have_the_defaults_that_are_promised() -> None:
    found = config()
    assert (found.max_body_bytes, found.max_header_bytes, found.stream_buffer_bytes) == (8 << 20, 64 << 10, 256 << 10)
    assert (found.header_seconds, found.body_seconds, found.slow_client_seconds) == (10, 60, 30)
    assert found.request_timeout_seconds == 600
    assert not found.share_prefix_cache
    scheduler = engine_config(_parser()[0].parse_args(["serve", "--simulate"]), "").scheduler
    assert (scheduler.max_queued_requests, scheduler.max_queued_tokens) == (1024, 1 << 20)


def test_limits_are_set_by_flags() -> None:
    found = config(
        "--max-body-size", "1M", "--max-header-size", "8K", "--stream-buffer", "32K", "--header-timeout", "1",
        "--body-timeout", "2", "--slow-reader-timeout", "3", "--request-timeout", "4.5", "--share-prefix-cache",
    )  # fmt: skip
    assert (found.max_body_bytes, found.max_header_bytes, found.stream_buffer_bytes) == (1 << 20, 8 << 10, 32 << 10)
    assert (found.header_seconds, found.body_seconds, found.slow_client_seconds) == (1, 2, 3)
    assert found.request_timeout_seconds == 4.5
    assert found.share_prefix_cache


@pytest.mark.parametrize("flag", ["--request-timeout", "--header-timeout", "--body-timeout", "--slow-reader-timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_times_that_are_none_are_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(f"{flag}={value}")
    assert caught.value.flag == flag


def test_no_prompt_and_no_key_is_in_what_the_server_remembers_of_its_configuration(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("very-secret\n")
    assert "very-secret" not in repr(config("--api-key-file", str(keys)))
