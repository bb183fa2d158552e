"""A killed run goes on where it was, gives the bytes of an undisturbed one, and never mixes two recipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.quantize import weights
from nvfp4_runtime.quantize.ptq import quantize_checkpoint
from nvfp4_runtime.quantize.resume import JOURNAL, partial_folder
from tests import tiny

CONFIG = tiny.llama_config(dtype="bfloat16")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_plain(tmp_path / "src", CONFIG, tiny.random_tensors(CONFIG, dtype=torch.bfloat16))


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The partial folder of a run to `out` that ended after some layers."""
    calls = []

    def once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    real = weights.nvfp4
    with monkeypatch.context() as patch:
        patch.setattr(weights, "nvfp4", once)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=False)
    return partial_folder(tmp_path / "out")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_next_run_goes_on_and_gives_the_bytes_of_an_undisturbed_one(interrupted, source, tmp_path, monkeypatch):
    made = []
    real = weights.nvfp4
    monkeypatch.setattr(weights, "nvfp4", lambda *a, **o: made.append(1) or real(*a, **o))
    quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=False)
    assert not interrupted.exists()
    assert 10 <= len(made) < 14  # of 14 layers; the one in the making and its group may be made again
    quantize_checkpoint(source, tmp_path / "whole", max_shard_bytes=20_000, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_the_journal_claims_is_checked_against_the_bytes(interrupted, source, tmp_path):
    shard = sorted(interrupted.glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-500:] = bytes(500)
    shard.write_bytes(damaged)
    with (interrupted / JOURNAL).open("a") as journal:
        journal.write('{"tensor": "model.norm.wei')  # a line that a kill cut short
    quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=False)
    quantize_checkpoint(source, tmp_path / "whole", max_shard_bytes=20_000, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_recipe_is_refused_and_says_what_differs(interrupted, source, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe differs \(method: mse there, max now\)"):
        quantize_checkpoint(source, tmp_path / "out", method="max", max_shard_bytes=20_000, progress=False)
    with pytest.raises(ConfigError, match="recipe differs"):
        quantize_checkpoint(source, tmp_path / "out", exclude=["*.down_proj"], progress=False)
    assert interrupted.exists()


def test_another_source_is_refused(interrupted, source, tmp_path):
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConfigError, match=r"source differs \(files"):
        quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=False)


def test_a_source_that_can_never_be_quantised_leaves_nothing(tmp_path):
    tensors = tiny.random_tensors(CONFIG, dtype=torch.bfloat16)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    source = tiny.write_plain(tmp_path / "src", CONFIG, tensors)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_two_runs_to_one_folder_do_not_meet(interrupted, source, tmp_path):
    import fcntl

    with (interrupted / JOURNAL).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is making"):
            quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=False)


SLOW_CHILD = """
import sys, time
from nvfp4_runtime.quantize import weights
from nvfp4_runtime.quantize.ptq import quantize_checkpoint
real = weights.nvfp4
def slowly(*a, **o):
    time.sleep(0.1)
    return real(*a, **o)
weights.nvfp4 = slowly
quantize_checkpoint(sys.argv[1], sys.argv[2], progress=False)
"""


def test_a_run_killed_by_the_system_is_gone_on_from(source, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", SLOW_CHILD, str(source), str(tmp_path / "out")])
    journal = partial_folder(tmp_path / "out") / JOURNAL
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 8):
        assert time.monotonic() < deadline, "the child wrote nothing"
        assert child.poll() is None, "the child ended before it was killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = journal.read_text().count("crc32")
    assert 0 < before < 60
    quantize_checkpoint(source, tmp_path / "out", progress=False)
    quantize_checkpoint(source, tmp_path / "whole", progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
